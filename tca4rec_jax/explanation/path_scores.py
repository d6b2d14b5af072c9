"""Log-probabilities of LLM and CF model along the paths of titles, after several histories.

Axes: core/__init__.py; here R are histories, J the inner nodes that the paths pass, L the trie's
levels below the root, M the nodes of a level.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.decoding.title_paths import TitlePaths, TitleScores
from tca4rec_jax.explanation.explanation import Settings


@dataclass(frozen=True, eq=False)
class PathScores:
    """Log-probabilities float64 at the nodes that paths pass; of a child that is not open, any.

    Attributes:
      trie: compressed.
      llm, cf: by inner node, of its children [R, C]; the root is the first, the others ascend.
      forced: by node but the root, the LLM's of the tokens of its edge but the first, [R].
      open_N: int, the items below every node that may be recommended.
    """

    trie: ItemTrie
    llm: dict[int, np.ndarray]
    cf: dict[int, np.ndarray]
    forced: dict[int, np.ndarray]
    open_N: np.ndarray

    @classmethod
    def of(
        cls,
        trie: ItemTrie,
        paths: TitlePaths,
        scores: TitleScores,
        log_p_cf: tuple[np.ndarray, np.ndarray],
        allowed_I: np.ndarray,
        *,
        vocabulary: bool,
    ) -> "PathScores":
        """Of what LLM and CF model say at the nodes of `inner_nodes`.

        As a search scores: log p_cf is over the allowed items (bool), of the root [R, C] and of the
        others [R, J, C], and so is the LLM's softmax, unless it is over the `vocabulary`.
        """
        open_N = open_items(trie, allowed_I)
        place = {int(node): at for at, node in np.ndenumerate(paths.node_LxM) if node}
        forced = {node: np.float64(scores.inner.forced_BxM[:, *at]) for node, at in place.items()}
        llm, cf = {}, {}
        root_RxC, inner_RxJxC = log_p_cf
        for number, node in enumerate(inner_nodes(trie, paths)):
            one, at = (scores.inner, place[node]) if node else (scores.root, (0,))
            is_open_C = open_N[children(trie, node)] > 0
            logits_RxC = one.child_BxMxC[:, *at, : is_open_C.size].astype(np.float64)
            norm_Rx1 = one.norm_BxM[:, *at].astype(np.float64)[:, None]
            llm[node] = (
                np.minimum(logits_RxC - norm_Rx1, 0.0)
                if vocabulary
                else log_softmax(np.where(is_open_C, logits_RxC, -np.inf), axis=1)
            )
            # Once more in float64, so that they add up to 1.
            log_p_cf_RxC = inner_RxJxC[:, number - 1] if node else root_RxC
            cf[node] = log_softmax(log_p_cf_RxC[:, : is_open_C.size].astype(np.float64), axis=1)
        return cls(trie, llm, cf, forced, open_N)  # type: ignore[arg-type]  # arrays, not scalars

    def path(self, leaf: int) -> list[tuple[int, int]]:
        """(node, which of its children comes next) from the root to a leaf."""
        path_K = self.trie.paths_QxK[leaf]
        pairs = itertools.pairwise(path_K[path_K >= 0].tolist())
        return [(node, child - int(self.trie.child_start[node])) for node, child in pairs]

    def log_probs(self, leaf: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(LLM's, CF model's, LLM's forced) [R] at every step of `path`."""
        return [
            (
                self.llm[node][:, child],
                self.cf[node][:, child],
                self.forced[int(self.trie.child_start[node]) + child],
            )
            for node, child in self.path(leaf)
        ]

    def parts(self, leaf: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
        """What LLM and guidance add to the score of a leaf's title after every history: [R]."""
        llm, cf, forced = (np.sum(one, axis=0) for one in zip(*self.log_probs(leaf), strict=True))
        divisor = float(self.trie.lengths_Q[leaf]) ** settings.length_penalty
        guided = settings.guidance * cf / divisor
        return (llm + forced) / divisor, guided + 0.0  # without guidance 0, not -0


def children(trie: ItemTrie, node: int) -> slice:
    """Those of a node."""
    start = int(trie.child_start[node])
    return slice(start, start + int(trie.child_count[node]))


def open_items(trie: ItemTrie, allowed_I: np.ndarray) -> np.ndarray:
    """int [N]: how many allowed items (bool) are below every node."""
    count_Q = np.bincount(trie.leaf_of_item[allowed_I], minlength=trie.num_leaves)
    before_Q = np.concatenate([[0], np.cumsum(count_Q)])
    return before_Q[trie.leaf_stop] - before_Q[trie.leaf_start]


def inner_nodes(trie: ItemTrie, paths: TitlePaths) -> list[int]:
    """The nodes with children that paths pass: the root, then ascending."""
    nodes = np.unique(np.append(0, paths.node_LxM))
    return nodes[trie.child_count[nodes] > 0].tolist()
