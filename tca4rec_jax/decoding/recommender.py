"""`Recommender`: a trained run as a recommender of catalogue items for anyone's history.

    recommender = Recommender.load("runs/quickstart", "aligned")
    recommender.recommend(["Toy Story (1995)", "Fargo (1996)"], k=5)

Axis letters: R rows, H history items, I items.
"""

import difflib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.scoring import cf_logits
from tca4rec_jax.config import build, default_config, score_weights
from tca4rec_jax.data.prompts import prompts
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.candidates import score_candidates
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.run import Run


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

    def __init__(self, run: Run, name: str, *, guidance: float = 0.0):
        """The LLM run `name` below run.workdir/llm, or the LLM as it came if name is ''.

        Raises:
          FileNotFoundError, ValueError: guidance without the CF model that was trained, or a filter
            that does not fit the catalogue.
        """
        fields, self._run, self._name = run.config.decoding, run, name
        self._weights = score_weights(run.config, guidance)
        self._filter = ItemFilter.from_config(fields, run.data.catalogue)
        self._cf = _cf_model(run) if guidance > 0 else None
        self._searches: dict[int, BatchedSearch] = {}

    @classmethod
    def load(cls, workdir: str | Path, name: str, *, guidance: float = 0.0) -> "Recommender":
        """From a work directory, with the config that the LLM run `name` was trained with."""
        workdir = Path(workdir)
        path = workdir / "llm" / name / "config.json"
        if not name or not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: train the run {name!r} with launch/train.py, or make "
                "Recommender(Run(config, workdir), '') to use the LLM as it came"
            )
        config = default_config()
        with config.ignore_type():  # JSON has no tuples
            config.update(ConfigDict(json.loads(path.read_text("utf-8"))))
        config.mesh = default_config().mesh  # of the devices that are here
        return cls(Run(config, workdir), name, guidance=guidance)

    def recommend(
        self, histories: Sequence, k: int = 10, *, progress: str | None = None
    ) -> list[Recommended] | list[list[Recommended]]:
        """The best k items after one history, or after each of several, best first.

        Args:
          histories: items, oldest first; or a sequence of such histories.
          progress: label of a progress bar.

        Returns:
          For one history a list, for several a list of lists; shorter than k only if the catalogue
          (what of it may be recommended) is. A score is a log-probability, guidance included.

        Raises:
          UserError: no history, an empty one, an unknown item (with what is spelt like it), k < 1.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        single, history_RxH = self._histories(histories)
        found = self._search(k).recommend(
            self._decoder,
            self._prompts(history_RxH),
            self._weights,
            self._cf and partial(self._cf_rows, history_RxH),
            allowed=(masks := self._filter.masks(history_RxH)),
            progress=progress,
        )
        allowed_RxI = None if masks is None else masks(np.arange(len(history_RxH)))
        trie, catalogue = self._run.trie, self._run.data.catalogue
        items_RxK = found.items(trie, k, allowed_RxI)
        score_of = [
            dict(zip(leaves_M.tolist(), scores_M.tolist(), strict=True))
            for leaves_M, scores_M in zip(found.leaves_RxM, found.scores_RxM, strict=True)
        ]
        lists = [
            [
                Recommended(
                    catalogue.item_ids[i], catalogue.titles[i], scores[trie.leaf_of_item[i]]
                )
                for i in items_K.tolist()
                if i >= 0
            ]
            for items_K, scores in zip(items_RxK, score_of, strict=True)
        ]
        return lists[0] if single else lists

    def score(self, history: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
        """Exact scores float32 [candidates] of given items, to re-rank another system's list.

        Raises UserError as `recommend`. Filters do not apply.
        """
        _, history_RxH = self._histories([list(history)])
        items = self._items(candidates, "candidates")
        fields = self._run.config.decoding
        return score_candidates(
            self._run.trie,
            build(SearchConfig, fields),
            self._decoder,
            self._prompts(history_RxH),
            Ragged.from_lengths(items, np.array([len(items)])),
            self._weights,
            self._cf and partial(self._cf_rows, history_RxH),
            mesh=self._run.mesh,
            batch_size=self._run.mesh.size,
            progress=None,
        ).values

    @cached_property
    def _decoder(self):
        return self._run.inference_decoder(self._name)

    def _search(self, k: int) -> BatchedSearch:
        fields, inference = self._run.config.decoding, self._run.config.inference
        beams = max(k, fields.beams)
        if beams not in self._searches:
            self._searches[beams] = BatchedSearch(
                self._run.trie,
                build(SearchConfig, fields, beams=beams),
                mesh=self._run.mesh,
                batch_size=inference.batch_size,
                buckets=inference.buckets,
            )
        return self._searches[beams]

    def _prompts(self, history_RxH: np.ndarray) -> Ragged:
        return prompts(self._run.titles, history_RxH, self._run.config.prompt.max_tokens)

    def _histories(self, histories: Sequence) -> tuple[bool, np.ndarray]:
        """(whether it was a single one, int32 [R, H] padded on the left)."""
        if isinstance(histories, str) or not len(histories):
            raise UserError("give a history: a list of item ids or titles, or a list of such lists")
        single = isinstance(histories[0], str)
        rows = [
            self._items(history, f"history {row}")
            for row, history in enumerate([histories] if single else histories)
        ]
        length = self._run.config.data.history_length
        history_RxH = np.full((len(rows), length), PAD_ITEM, np.int32)
        for row, items in enumerate(rows):
            items = items[-length:]
            history_RxH[row, length - len(items) :] = items
        return single, history_RxH

    @cached_property
    def _item_of_title(self) -> dict[str, int]:
        titles = self._run.data.catalogue.titles
        return {title: item for item, title in reversed(list(enumerate(titles)))}

    def _items(self, names: Sequence[str], what: str) -> np.ndarray:
        if isinstance(names, str) or not len(names):
            raise UserError(f"{what} is {names!r}: expected a list of item ids or titles")
        items = self._run.data.catalogue.find(names)
        for at in np.flatnonzero(items < 0):
            if (item := self._item_of_title.get(names[at])) is None:
                near = difflib.get_close_matches(names[at], self._item_of_title, 3, 0.5)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise UserError(f"{what}: {names[at]!r} is no item id and no title{hint}")
            items[at] = item
        return items

    def _cf_rows(self, history_RxH: np.ndarray, rows_B: np.ndarray) -> np.ndarray:
        return self._cf(history_RxH[rows_B])


def _cf_model(run: Run):
    """history int32 [B, H] -> CF logits of all items, float32 [B, I]."""
    path = run.workdir / "cf" / "checkpoint.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"guidance needs CF logits of new histories, but there is no CF model at {path}: "
            "train it with launch/train_cf.py, or set guidance to 0"
        )
    _, model = load_model(path)
    if model.config.num_items != run.data.catalogue.num_items:
        raise UserError(
            f"{path} knows {model.config.num_items} items, the catalogue has "
            f"{run.data.catalogue.num_items}: run launch/train_cf.py again"
        )

    @nnx.jit
    def logits(model, history_BxS):
        vectors_BxD, (table_IxD, bias_I) = model.user_vectors(history_BxS), model.items()
        return vectors_BxD if table_IxD is None else cf_logits(vectors_BxD, table_IxD, bias_I)

    def of_histories(history_BxH):
        length = model.config.history_length or history_BxH.shape[1]
        history_BxH = history_BxH[:, -length:]
        room = ((0, 0), (length - history_BxH.shape[1], 0))
        return np.asarray(logits(model, np.pad(history_BxH, room, constant_values=PAD_ITEM)))

    return of_histories
