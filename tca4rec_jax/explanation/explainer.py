"""`Explainer`: a recommender's list, taken apart into the choices that made it.

    explainer = Explainer(Recommender.load("runs/quickstart", "aligned", guidance=1.0))
    explanation = explainer.explain(["Toy Story (1995)", "Fargo (1996)"], k=5)

Axes: core/__init__.py; here J are the inner nodes of the explained titles' paths, R histories: the
user's, then those without one of its items.
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import (
    CFItems,
    cf_logits,
    child_log_probs,
    node_log_mass,
)
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.title_paths import TitlePaths
from tca4rec_jax.distributed import sharding
from tca4rec_jax.errors import UserError
from tca4rec_jax.explanation.explanation import (
    ExplainedItem,
    Explanation,
    HistoryItem,
    Settings,
    compared,
)
from tca4rec_jax.explanation.path_scores import PathScores, inner_nodes
from tca4rec_jax.explanation.tree import Tree


class Explainer:
    """Explains the lists of a recommender; the first call loads and compiles.

    Sizes are rounded: of as many titles, another explanation compiles nothing new but, for the
    first prompts of a length, reading these.
    """

    def __init__(self, recommender: Recommender):
        """Raises UserError for scores that are no products along a path (grounding)."""
        self._recommender, self._experiment = recommender, recommender.experiment
        if self._experiment.config.decoding.find == "grounding":
            raise UserError(
                "decoding.find is 'grounding': its scores are distances of free texts, which no "
                "path through the trie explains; set decoding.find=beams"
            )

    def explain(
        self,
        history: Sequence[str],
        k: int = 10,
        *,
        children: int = 5,
        compare: Sequence[tuple[str, str]] = (),
        guidance: float | None = None,
        filter: ItemFilter | None = None,
        leave_one_out: bool = True,
    ) -> Explanation:
        """Why the best k items after a history are as they are.

        Args:
          history: items, oldest first, by id or title.
          k: length of the list.
          children: how many of a branch's best children are named, besides those that lead to an
            explained item.
          compare: pairs of items, of the list or not: why the first stands before the second.
          guidance: the CF model's weight; by default the recommender's.
          filter: what may be recommended; by default as decoding says.
          leave_one_out: score the items after the history without each of its items, too (of the
            latest that the LLM or the CF model reads). What the whole history leaves out of the
            list stays left out. Of a history of one item nothing would be left.

        Raises UserError as `Recommender.recommend`, and for items to compare that are unknown or
        may not be recommended to this user; FileNotFoundError if there is no trained CF model.
        """
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        recommender = self._recommender
        item_S = recommender.find(history, "the history")
        asked = [recommender.find(pair, "the items to compare").tolist() for pair in compare]
        allowed_I = self._allowed(item_S, filter or recommender.item_filter)
        self._check_allowed(asked, allowed_I)
        # Asked for by its number, a guidance comes with the CF model, 0 too.
        weights = recommender.weights_of(recommender.weights_of(guidance).guidance)
        listed, without = self._lists(item_S, allowed_I, k, weights)
        items = list(dict.fromkeys([*listed, *(item for pair in asked for item in pair)]))
        if not items:
            raise UserError("no item may be recommended after this history")
        left_out = self._read(item_S) if leave_one_out and len(item_S) > 1 else []
        histories = [item_S, *(np.delete(item_S, place) for place in left_out)]
        scores = self._scores(histories, items, allowed_I, weights)
        settings = self._settings(weights)
        leaves = self._experiment.trie.leaf_of_item[items].tolist()
        tree = Tree(scores, leaves, settings, self._decode, children)
        parts = [scores.parts(leaf, settings) for leaf in leaves]
        explained = [
            self._item(item, listed, without, part, tree.steps(leaf))
            for item, leaf, part in zip(items, leaves, parts, strict=True)
        ]
        pairs = [(items.index(first), items.index(second)) for first, second in asked]
        return Explanation(
            settings=settings,
            history=self._history(item_S, left_out, np.array(parts).sum(axis=1)),
            items=tuple(explained),
            without=tuple(map(self._names, without)) if settings.guidance else (),
            branches=tree.branches,
            comparisons=tuple(compared(explained, tree.branches, settings, pair) for pair in pairs),
        )

    def _history(
        self, item_S: np.ndarray, left_out: list[int], score_XxR: np.ndarray
    ) -> tuple[HistoryItem, ...]:
        """With effects: of scores after the whole history, then without each item left out."""
        effect_SxX = np.zeros((len(item_S), len(score_XxR) if left_out else 0))
        if left_out:
            effect_SxX[left_out] = (score_XxR[:, :1] - score_XxR[:, 1:]).T
        told = zip(item_S.tolist(), effect_SxX.tolist(), strict=True)
        return tuple(HistoryItem(*self._names(item), tuple(effects)) for item, effects in told)

    def _settings(self, weights: ScoreWeights) -> Settings:
        config = self._experiment.config
        numbers = {name: float(value) for name, value in weights._asdict().items()}
        first, last = config.objective.alpha, config.objective.alpha_last
        alpha = float(first if last is None else last)
        return Settings(**numbers, alpha=alpha, mask=config.decoding.mask)

    def _allowed(self, item_S: np.ndarray, allowed: ItemFilter) -> np.ndarray:
        masks = allowed.masks(Ragged.from_lengths(item_S, np.array([len(item_S)])))
        every_I = np.ones(self._experiment.trie.num_items, bool)
        return every_I if masks is None else masks(np.arange(1))[0]

    def _check_allowed(self, asked: list[list[int]], allowed_I: np.ndarray) -> None:
        for item in (item for pair in asked for item in pair):
            if not allowed_I[item]:
                raise UserError(
                    f"the items to compare: {self._names(item)[1]!r} may not be recommended here "
                    "(allow- or deny-list, title length, or in the history)"
                )

    def _read(self, item_S: np.ndarray) -> list[int]:
        """The places of the history that LLM or CF model read; the others have no effect."""
        cf_length = self._recommender.cf_model.history_length
        most = max(self._experiment.config.data.history_length, cf_length)
        return list(range(max(0, len(item_S) - most), len(item_S)))

    def _names(self, item: int) -> tuple[str, str]:
        catalogue = self._experiment.data.catalogue
        return catalogue.item_ids[item], catalogue.titles[item]

    def _item(self, item: int, listed, without, part, steps) -> ExplainedItem:
        llm, cf = (float(part_R[0]) for part_R in part)
        trie = self._experiment.trie
        return ExplainedItem(
            *self._names(item),
            place=listed.index(item) + 1 if item in listed else None,
            place_without=without.index(item) + 1 if item in without else None,
            score=llm + cf,
            llm=llm,
            cf=cf,
            tokens=int(trie.lengths_Q[trie.leaf_of_item[item]]),
            steps=steps,
        )

    def _decode(self, tokens: np.ndarray, is_end: bool) -> str:
        """The text of tokens, without the end token that stands after titles."""
        tokens = tokens[:-1] if is_end and self._experiment.config.prompt.end else tokens
        decode = self._experiment.tokenizer.decode
        return str(decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    def _rows(self, histories: Sequence[np.ndarray], allowed_I: np.ndarray) -> SearchRows:
        item_ids = self._experiment.data.catalogue.item_ids
        names = [[item_ids[item] for item in item_S] for item_S in histories]
        # A filter for each, so that programs have room for one whatever it allows.
        return self._recommender.rows(names, [ItemFilter(allowed_I)] * len(names))

    def _sized(self, search: BatchedSearch, rows: SearchRows) -> BatchedSearch:
        """With room for the longest prompt, so that only reading a prompt depends on its length."""
        longest = self._experiment.config.prompt.max_tokens
        sizes = search.sizes(rows.prompts.lengths).rounded(longest)
        room = max(-(-longest // 8) * 8, *sizes.buckets)
        return search.of_sizes(sizes._replace(buckets=(*sizes.buckets, room)))

    def _lists(
        self, item_S: np.ndarray, allowed_I: np.ndarray, k: int, weights: ScoreWeights
    ) -> tuple[list[int], list[int]]:
        """The list and that without guidance, of a prompt that is read once."""
        rows = dataclasses.replace(self._rows([item_S], allowed_I), guided=True)
        search = self._sized(self._recommender.search_of(k), rows)
        jobs = [(self._recommender.decoder, [weights, weights._replace(guidance=0.0)])]
        (found,) = search.sweep(jobs, rows, progress=None)
        lists = (one.items(self._experiment.trie, k, rows.allowed)[0].tolist() for one in found)
        listed, without = ([item for item in one if item >= 0] for one in lists)
        return listed, without

    def _scores(
        self, histories: Sequence[np.ndarray], items: list[int], allowed_I, weights: ScoreWeights
    ) -> PathScores:
        """Of LLM and CF model after every history, along the titles of items."""
        search, trie = self._path_search, self._experiment.compressed_trie
        rows = self._rows(histories, allowed_I)
        paths = TitlePaths.of(trie, trie.leaf_of_item[items])
        sized = self._sized(search, rows)
        scores = sized.read_titles(self._recommender.decoder, rows, paths, weights.temperature)
        _, *nodes = inner_nodes(trie, paths)
        node_J = np.array(nodes, np.int32)
        most = max(len(node_J), 2 * paths.node_LxM.shape[1])  # seldom more, so of one size
        padded_J = np.pad(node_J, (0, _rounded(most) - len(node_J)))
        log_p_cf = self._cf(rows, len(histories), allowed_I, padded_J, weights.beta)
        vocabulary = search.config.vocabulary
        return PathScores.of(trie, paths, scores, log_p_cf, allowed_I, vocabulary=vocabulary)

    @cached_property
    def _path_search(self) -> BatchedSearch:
        """A search that walks the compressed trie, whatever its rules are."""
        search = self._recommender.search_of(1)
        return search.of_config(dataclasses.replace(search.config, rules="exact"))

    @cached_property
    def _trie(self) -> DeviceTrie:
        """That of the path search with all items on every device, as `node_log_mass` takes it."""
        search = self._path_search
        trie = search.config.device_trie(search.host_trie)
        return sharding.put(trie, sharding.replicated(search.mesh))

    def _cf(
        self, rows: SearchRows, count: int, allowed_I, node_J, beta: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p_cf of the children after every history: of the root [R, C], of nodes [R, J, C]."""
        assert rows.cf is not None
        padded_R = np.minimum(np.arange(_rounded(count)), count - 1)
        cf_RxD = np.asarray(rows.cf(padded_R), np.float32)
        search = self._path_search
        items = sharding.put(rows.cf_items, sharding.replicated(search.mesh))
        args = cf_RxD, items, allowed_I, node_J, self._trie, np.float32(beta)
        root_RxC, inner_RxJxC = map(np.asarray, _cf_log_probs(*args))
        return root_RxC[:count], inner_RxJxC[:count]


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@jax.jit
def _cf_log_probs(
    cf_RxD: jax.Array,
    items: CFItems,
    allowed_I: jax.Array,
    node_J: jax.Array,
    trie: DeviceTrie,
    beta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """log p_cf over the allowed items (bool), of the children of the root and of every node.

    One history after the other: of a large catalogue the root has many more children than others,
    and the logits and masses of all items and nodes are held once. Returns ([R, C], [R, J, C]).
    """
    sizes = trie.sizes

    def after_history(cf_D):
        logits_1xI = jnp.where(allowed_I[None, :], cf_logits(cf_D[None, :], items), -jnp.inf)
        mass_1xN = node_log_mass(logits_1xI, trie, beta)

        def at(node_K, children):
            pair_K = jnp.zeros_like(node_K)
            return child_log_probs(mass_1xN, pair_K, node_K, trie, children=children)

        (root_C,) = at(jnp.zeros(1, jnp.int32), sizes.root_children)
        return root_C, at(node_J, max(sizes.inner_children, 1))

    return jax.lax.map(after_history, cf_RxD)
