"""The decoding tree: the branches that titles pass, with the shares of their children.

Axes: core/__init__.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax

from tca4rec_jax.explanation.explanation import Branch, Child, Settings, Shares, Step
from tca4rec_jax.explanation.path_scores import PathScores, children

Decode = Callable[[np.ndarray, bool], str]  # int32 tokens, whether a title ends with them -> text


class Tree:
    """The branches of titles after the first of the histories that scores are of."""

    def __init__(
        self,
        scores: PathScores,
        leaves: Sequence[int],
        settings: Settings,
        decode: Decode,
        most: int,
    ):
        """Of the titles of leaves; `most` of the best children of a branch are named."""
        self._scores, self._settings, self._decode, self._most = scores, settings, decode, most
        self._number = {node: number for number, node in enumerate(scores.llm)}
        self._titles: dict[tuple[int, int], list[int]] = {}  # that take a child
        for title, leaf in enumerate(leaves):
            for step in scores.path(leaf):
                self._titles.setdefault(step, []).append(title)
        shares_of = {node: self._shares(node) for node in scores.llm}
        self._named = {
            node: self._best(node, shares_Cx4) for node, (shares_Cx4, _) in shares_of.items()
        }
        self.branches = tuple(self._branch(node, *found) for node, found in shares_of.items())

    def steps(self, leaf: int) -> tuple[Step, ...]:
        """The path of one of the leaves."""
        steps = zip(self._scores.path(leaf), self._scores.log_probs(leaf), strict=True)
        return tuple(
            Step(self._number[node], self._named[node].index(child), *(float(x[0]) for x in values))
            for (node, child), values in steps
        )

    def _shares(self, node: int) -> tuple[np.ndarray, Shares]:
        scores = self._scores
        is_open_C = scores.open_N[children(scores.trie, node)] > 0
        return shares(scores.llm[node][0], scores.cf[node][0], is_open_C, self._settings)

    def _best(self, node: int, shares_Cx4: np.ndarray) -> list[int]:
        """The children of a node that are named, best first."""
        is_open_C = self._scores.open_N[children(self._scores.trie, node)] > 0
        order = np.argsort(-shares_Cx4[:, -1], kind="stable")
        order = order[is_open_C[order]].tolist()
        best = {*order[: self._most]}
        return [child for child in order if child in best or (node, child) in self._titles]

    def _branch(self, node: int, shares_Cx4: np.ndarray, outside: Shares) -> Branch:
        scores, trie = self._scores, self._scores.trie
        open_C, named = scores.open_N[children(trie, node)], self._named[node]
        is_rest_C = open_C > 0
        is_rest_C[named] = False
        tokens = trie.tokens_QxL[trie.leaf_start[node], : trie.depth[node]]
        return Branch(
            prefix=self._decode(tokens, False),
            children=tuple(self._child(node, child, shares_Cx4[child]) for child in named),
            rest=Shares(*shares_Cx4[is_rest_C].sum(axis=0).tolist()),
            rest_children=int(is_rest_C.sum()),
            rest_items=int(open_C[is_rest_C].sum()),
            outside=outside,
        )

    def _child(self, node: int, child: int, shares_4: np.ndarray) -> Child:
        trie, titles = self._scores.trie, tuple(self._titles.get((node, child), ()))
        child_node = int(trie.child_start[node]) + child
        return Child(
            text=self._decode(trie.edge_tokens[child_node], bool(trie.leaf[child_node] >= 0)),
            shares=Shares(*shares_4.tolist()),
            items=int(self._scores.open_N[child_node]),
            explained=titles,
            branch=self._number.get(child_node),
        )


def shares(
    llm_C: np.ndarray, cf_C: np.ndarray, is_open_C: np.ndarray, settings: Settings
) -> tuple[np.ndarray, Shares]:
    """Probabilities float64 [C, 4] of children, in the order of Shares, and what is outside.

    From log-probabilities of the LLM and the CF model. Children that are not open (bool) have none.
    """
    log_guided_C = llm_C + settings.guidance * cf_C if settings.guidance else llm_C
    guided_C = softmax(np.where(is_open_C, log_guided_C, -np.inf))
    llm_C, cf_C = (np.where(is_open_C, np.exp(one), 0.0) for one in (llm_C, cf_C))
    outside = max(0.0, 1.0 - float(llm_C.sum()))
    shares_Cx4 = np.stack([llm_C, cf_C, mixed(llm_C, cf_C, settings.alpha), guided_C], axis=1)
    return shares_Cx4, Shares(outside, 0.0, float(mixed(outside, 0.0, settings.alpha)), 0.0)


def mixed(p, p_cf, alpha: float):
    """(1 - alpha) * p + alpha * p_cf: a soft label of training, where p is one-hot."""
    return (1.0 - alpha) * p + alpha * p_cf
