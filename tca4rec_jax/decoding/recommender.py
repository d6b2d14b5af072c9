"""`Recommender`: a trained run as a recommender of catalogue items for anyone's history.

    recommender = Recommender.load("runs/quickstart", "aligned")
    recommender.recommend(["Toy Story (1995)", "Fargo (1996)"], k=5)

Axes: core/__init__.py; here S are history items, X items of a list.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.settings import model_inputs
from tca4rec_jax.config import score_weights
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.data.templates import reads_users
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.candidate_questions import CandidateQuestions
from tca4rec_jax.decoding.engine import BatchedSearch, BatchSizes, SearchRows
from tca4rec_jax.decoding.filters import ItemFilter, masks_of
from tca4rec_jax.decoding.list_inputs import list_inputs
from tca4rec_jax.decoding.spelling import hint, shown
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.recommenders.vectors import soft_rows

_PROMPTS_AT_ONCE = 1024  # of a file whose lengths are counted


class Recommended(NamedTuple):
    """One item of a list."""

    item_id: str
    title: str
    score: float


class Recommender:
    """Recommends with one LLM of a run; the first call loads and compiles.

    Items are named by their id or, where no id is spelt so, by their title (of several items that
    share one, the first). What may be recommended is in config.decoding, see ItemFilter.
    """

    def __init__(self, experiment: Experiment, name: str, *, guidance: float = 0.0):
        """The LLM run `name` below experiment.workdir/llm, or the untrained LLM if name is ''.

        Raises FileNotFoundError or UserError as Experiment.check_run, for guidance without the CF
        model that was trained, or for a filter that does not fit the catalogue.
        """
        self.experiment, self._name = experiment, name
        self._weights = score_weights(experiment.config, guidance)
        if name:
            experiment.check_run(name, guided=guidance > 0)
        self.item_filter = experiment.item_filter
        self._reads_cf = guidance > 0 or reads_users(experiment.config.prompt)
        if self._reads_cf:
            self.cf_model  # noqa: B018 - loaded now
        self._questions = CandidateQuestions(experiment)
        self._search = cache(experiment.search)
        self._scoring_of: dict[int, BatchedSearch] = {}  # by beams; a cached method is a cycle

    @classmethod
    def load(cls, workdir: str | Path, name: str, *, guidance: float = 0.0) -> "Recommender":
        """From a work directory, with the config that the LLM run `name` was trained with."""
        if not name:
            raise UserError("give a run, or make Recommender(Experiment(config, workdir), '')")
        return cls(Experiment.of_run(Path(workdir), name), name, guidance=guidance)

    def recommend(
        self,
        histories: Sequence,
        k: int = 10,
        *,
        guidance: float | None = None,
        filters: Sequence[ItemFilter] | None = None,
        sizes: BatchSizes | None = None,
        progress: str | None = None,
    ) -> list:
        """The best k items after one history, or after each of several, best first.

        A history is a sequence of items, oldest first. Returns a list of Recommended for one, a
        list of such lists for several; shorter than k only if fewer items may be recommended. A
        score is a log-probability, guidance included, or with decoding.find=grounding the distance,
        scaled and negative. `progress` is the label of a progress bar.

        `guidance` is another weight than the recommender's, `filters` one for each history in the
        place of decoding's, from `filter`; others, 0 included, compile nothing new.
        `sizes` are those of many histories that are passed in parts; by default the call has a
        batch for its histories, of one of a few sizes that are each compiled once.

        Raises UserError for no history, an empty one, an unknown item (with what is spelt like it),
        k < 1, or prompts that show candidates (`score` takes them), and as __init__ for guidance.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        single = not isinstance(histories, str) and len(histories) and isinstance(histories[0], str)
        weights = self.weights_of(guidance)
        allowed = self.item_filter if filters is None else filters
        rows = self.rows([histories] if single else histories, allowed)
        rows = dataclasses.replace(rows, guided=guidance is not None)
        search = self.search_of(k)
        if sizes is None:
            sizes = search.sizes(rows.prompts.lengths)
            sizes = sizes.rounded(self.experiment.config.prompt.max_tokens)
        search = search.of_sizes(sizes)
        found = search.recommend(self.decoder, rows, weights, progress=progress)
        trie, catalogue = self.experiment.trie, self.experiment.data.catalogue
        item_ids, titles = catalogue.item_ids, catalogue.titles
        lists = []
        for row, items_X in enumerate(found.items(trie, k, rows.allowed)):
            score_of = dict(zip(found.leaves_RxM[row], found.scores_RxM[row].tolist(), strict=True))
            items = items_X[items_X >= 0].tolist()
            scores = (score_of[leaf] for leaf in trie.leaf_of_item[items])
            names = ([column[item] for item in items] for column in (item_ids, titles))
            lists.append(list(map(Recommended, *names, scores)))
        return lists[0] if single else lists

    def sizes(self, histories: Iterable[Sequence[str]], k: int) -> BatchSizes:
        """The `sizes` that suit all of many histories, for `recommend` of their parts."""
        rest, lengths = iter(histories), []
        while part := list(itertools.islice(rest, _PROMPTS_AT_ONCE)):
            lengths.append(self.rows(part, self.item_filter).prompts.lengths)
        return self.search_of(k).sizes(np.concatenate(lengths))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the lists depend on besides the histories: provenance."""
        inputs = list_inputs(self.experiment, self._name, [self._weights])
        if self._reads_cf:
            inputs["CF model"] = file_sha256(CFModel.path(self.experiment))
        return inputs

    def filter(
        self,
        *,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        exclude_history: bool | None = None,
    ) -> ItemFilter:
        """Of the items that decoding allows only `allow` and not `deny`, by id or title.

        Raises UserError for an unknown item, or if none is left.
        """
        found, everything = self.item_filter, self.experiment.data.catalogue.num_items
        if allow is not None:
            found = found.only(np.isin(np.arange(everything), self.find(allow, "allow")))
        if len(deny):
            found = found.only(~np.isin(np.arange(everything), self.find(deny, "deny")))
        if exclude_history is not None:
            found = dataclasses.replace(found, exclude_history=exclude_history)
        return found

    def score(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        *,
        liked: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Exact scores float32 [candidates] of given items, to re-rank another system's list.

        They are those of the whole catalogue, without filters. Of a recommender that answers Yes or
        No a score is log P(yes) - log P(no), guidance by the calibrated CF model included, as
        evaluation has it; `liked` says which items of the history the user likes, by default all,
        for prompts that show {liked}.

        Raises UserError as `recommend`, and for `liked` that fits neither the history nor prompts.
        """
        return self.scores([history], [candidates], liked=None if liked is None else [liked])[0]

    def scores(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[str]],
        *,
        guidance: float | None = None,
        liked: Sequence[Sequence[bool]] | None = None,
        most: int | None = None,
        sizes: BatchSizes | None = None,
    ) -> np.ndarray:
        """`score` float32 [R, candidates] of as many candidates for each of R histories.

        Up to `most` candidates, and any `guidance`, have one compiled program. A recommender that
        answers is asked in batches, of one of a few sizes that are each compiled once. Raises
        UserError as `score`, and for lists that are not as many as histories, or differ in length.
        """
        items_RxN = self._candidates(candidates, histories, most)
        if self.experiment.recipe.evaluated_by == "answers":
            return self._answer_scores(histories, items_RxN, liked, guidance, sizes)
        if liked is not None:
            raise UserError("liked goes with recommenders that answer Yes or No: omit it")
        trie, every_item = self.experiment.trie, np.arange(self.experiment.trie.num_items)
        filters = [ItemFilter(np.isin(every_item, items)) for items in items_RxN]
        weights = self.weights_of(guidance)
        rows = self.rows(histories, filters, items_RxN)
        rows = dataclasses.replace(rows, guided=guidance is not None)
        search = self._scoring(most or items_RxN.shape[1])
        search = search.of_sizes(sizes or search.sizes(rows.prompts.lengths))
        found = search.recommend(self.decoder, rows, weights, progress=None)
        leaf_RxN = trie.leaf_of_item[items_RxN]
        is_leaf_RxNxM = found.leaves_RxM[:, None, :] == leaf_RxN[:, :, None]
        return np.take_along_axis(found.scores_RxM, np.argmax(is_leaf_RxNxM, axis=2), axis=1)

    def _candidates(
        self, candidates: Sequence[Sequence[str]], histories: Sequence, most: int | None
    ) -> np.ndarray:
        """int32 [R, N]. Raises as `scores`."""
        if isinstance(candidates, str) or not len(candidates) == len(histories) > 0:
            raise UserError(
                f"candidates: expected a list for each of {len(histories)} histories, "
                f"got {repr(candidates) if isinstance(candidates, str) else len(candidates)}"
            )
        found = [self.find(names, "candidates") for names in candidates]
        fewest, longest = min(map(len, found)), max(map(len, found))
        if fewest < longest or (most or longest) < longest:
            raise UserError(
                f"candidates: expected as many of each history, at most {most or 'any number'}, "
                f"got {fewest} to {longest}"
            )
        return np.stack(found)

    def _answer_scores(
        self,
        histories: Sequence[Sequence[str]],
        items_RxN: np.ndarray,
        liked: Sequence[Sequence[bool]] | None,
        guidance: float | None,
        sizes: BatchSizes | None,
    ) -> np.ndarray:
        """`scores` of a recommender that answers: a question is a row of the search."""
        weights = self.weights_of(guidance)
        cf = self.cf_model if self._reads_cf else None
        guided = weights.guidance > 0 or guidance is not None
        calibrated = self._calibration if guided else None
        items = self._histories(histories)
        rows = self._questions.rows(items, items_RxN, liked, cf, calibrated)
        rows = dataclasses.replace(rows, guided=guidance is not None)
        search, longest = self._search(2), self.experiment.config.prompt.max_tokens
        sizes = sizes or search.sizes(rows.prompts.lengths).rounded(longest)
        found = search.of_sizes(sizes).recommend(self.decoder, rows, weights, progress=None)
        return self._questions.log_odds(found).reshape(items_RxN.shape)

    @cached_property
    def _calibration(self) -> tuple[float, float]:
        return self._questions.calibration(self.cf_model)

    def _scoring(self, beams: int) -> BatchedSearch:
        # A beam for each candidate: none is ever dropped, and the prefixes that their titles share
        # are computed once.
        if beams not in self._scoring_of:
            search = self.search_of(1)
            rules: dict[str, Any] = {"rules": "exact", "renormalise": False}
            config = dataclasses.replace(search.config, beams=beams, **rules)
            self._scoring_of[beams] = search.of_config(config)
        return self._scoring_of[beams]

    def weights_of(self, guidance: float | None) -> ScoreWeights:
        """The weights of a call; the first with a guidance of its own loads the CF model."""
        if guidance is None:
            return self._weights
        self.load_cf()
        return self._weights._replace(guidance=guidance).check()

    def load_cf(self) -> None:
        """Loads the CF model, for guidance at a call. Raises as __init__ for guidance."""
        if not self._reads_cf:
            if self._name:
                self.experiment.check_run(self._name, guided=True)
            self.cf_model  # noqa: B018 - loaded now
            self._reads_cf = True

    @cached_property
    def cf_model(self) -> "CFModel":
        """The CF model of guidance, and of users in prompts. Raises as `CFModel.load`."""
        return CFModel.load(self.experiment)

    def search_of(self, k: int) -> BatchedSearch:
        """The search for lists of k items."""
        return self._search(max(k, self.experiment.config.decoding.beams))

    @cached_property
    def decoder(self) -> Decoder:
        """The LLM."""
        return self.experiment.inference_decoder(self._name)

    def rows(
        self,
        names: Sequence[Sequence[str]],
        allowed: ItemFilter | Sequence[ItemFilter],
        candidates_RxN: np.ndarray | None = None,
    ) -> SearchRows:
        """The rows of a search after histories, with a filter for all or one for each.

        Prompts take the latest data.history_length items, the CF model as many as it reads, and the
        filter the whole history. Raises UserError as `recommend`.
        """
        histories = self._histories(names)
        config, latest = self.experiment.config, partial(histories.latest, fill=PAD_ITEM)
        history_RxS = latest(np.arange(len(names)), config.data.history_length)
        prompts = self.experiment.prompts(history_RxS, candidates_RxN)
        users: dict[str, Any] = {}
        if self._reads_cf:
            cf = self.cf_model
            users["cf"] = lambda rows_B: cf.vectors(latest(rows_B, cf.history_length))
            users["cf_items"] = cf.items
        users["soft"] = soft_rows(self.experiment, prompts, **users)
        masks = allowed.masks if isinstance(allowed, ItemFilter) else partial(masks_of, allowed)
        return SearchRows(prompts.tokens, allowed=masks(histories), **users)

    def _histories(self, names: Sequence[Sequence[str]]) -> Ragged:
        """The items of histories. Raises UserError as `recommend`."""
        if isinstance(names, str) or not len(names):
            raise UserError("give a history: a list of item ids or titles, or a list of such lists")
        return self._find(names, [f"history {row}" for row in range(len(names))])

    @cached_property
    def _item_of_title(self) -> dict[str, int]:
        titles = self.experiment.data.catalogue.titles
        return {title: item for item, title in reversed(list(enumerate(titles)))}

    def find(self, names: Sequence[str], what: str) -> np.ndarray:
        """The items int32 of a history or of candidates, by id or title; nothing is loaded.

        Raises UserError, beginning with `what`, for none or an unknown one.
        """
        return self._find([names], [what]).values

    def _find(self, lists: Sequence[Sequence[str]], whats: Sequence[str]) -> Ragged:
        """`find` of several lists, each with its own `what`: one look-up takes as long as many."""
        for names, what in zip(lists, whats, strict=True):
            if isinstance(names, str) or not len(names):
                raise UserError(f"{what} is {names!r}: expected a list of item ids or titles")
        flat = list(itertools.chain.from_iterable(lists))
        items = self.experiment.data.catalogue.find(flat)
        found = Ragged.from_lengths(items, np.array([len(names) for names in lists]))
        for at in np.flatnonzero(items < 0).tolist():
            if (item := self._item_of_title.get(flat[at])) is None:
                titles, what = list(self._item_of_title), whats[int(found.row_of(at))]
                why = f"{shown(flat[at])} is no item id and no title{hint(flat[at], titles)}"
                raise UserError(f"{what}: {why}")
            items[at] = item
        return found


class CFModel(NamedTuple):
    """The trained CF model of a run, for new histories."""

    vectors: Callable[[np.ndarray], jax.Array]  # int32 [B, history_length] -> [B, D], on a device
    items: CFItems
    history_length: int  # items that it reads; 1 if it reads none

    @staticmethod
    def path(experiment: Experiment) -> Path:
        """Its file."""
        return experiment.workdir / "cf" / "checkpoint.npz"

    @classmethod
    def load(cls, experiment: Experiment) -> "CFModel":
        """Raises FileNotFoundError if there is none, StaleError for one of other inputs."""
        path = cls.path(experiment)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no CF model at {path}, which guidance and {{user}} in prompt.templates "
                "need for new histories: train it with launch/train_cf.py, or set guidance to 0"
            )
        catalogue_hash = experiment.data.catalogue.content_hash()
        cf = model_inputs(experiment.config.cf, experiment.workdir)
        now = {"cf": cf, "catalogue": catalogue_hash}
        model: Any = load_model(path, now)[1]
        graph, state = nnx.split(model)  # once: it takes longer than the vectors of a batch

        def vectors(state: nnx.State, history_BxS: np.ndarray) -> jax.Array:
            return nnx.merge(graph, state).user_vectors(history_BxS)

        items = jax.jit(lambda state: nnx.merge(graph, state).items())(state)
        return cls(partial(jax.jit(vectors), state), items, model.config.history_length or 1)
