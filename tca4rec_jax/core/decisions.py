"""The decisions along titles, and what a batch supervises.

A *decision* is a prefix of a title whose trie node has several children. Everywhere else the next
token is forced: the CF distribution is one-hot there, and a softmax over the children is 1.
"""

from typing import NamedTuple

import numpy as np

from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged


class Decisions(NamedTuple):
    """The decisions of a batch of rows; padding has weight 0 and node 0.

    Attributes:
      position: int32 [B, K], index into the row's supervised positions: where the token is decided.
      title: int32 [B, K], index into the row's supervised titles, each with CF logits of its own.
      node: int32 [B, K], node of the compressed trie.
      child: int32 [B, K], which of the node's children is on the title's path.
      weight: float32 [B, K].
    """

    position: Array
    title: Array
    node: Array
    child: Array
    weight: Array


class RaggedDecisions(NamedTuple):
    """The decisions of rows, before padding (host side): the fields of `Decisions`, int32."""

    position: Ragged
    title: Ragged
    node: Ragged
    child: Ragged

    def take(self, rows_B: np.ndarray) -> "RaggedDecisions":
        """Those of some rows (int), in the given order."""
        return RaggedDecisions(*(field.take(rows_B) for field in self))

    def before(self, position_R: np.ndarray) -> "RaggedDecisions":
        """Those at positions before position_R (int) of their row."""
        kept = self.position.values < np.repeat(position_R, self.position.lengths)
        ends = np.concatenate([[0], np.cumsum(kept)])[self.position.offsets]
        return RaggedDecisions(*(Ragged(field.values[kept], ends) for field in self))

    def pad(self, rows_B: np.ndarray, width: int | None = None) -> Decisions:
        """Those of some rows; by default as wide as the longest of all rows, so of one shape."""
        width = width or max(int(self.node.lengths.max()), 1)
        inside_BxK = np.arange(width) < self.node.lengths[rows_B][:, None]
        fields = (field.pad(rows_B, width, 0) for field in self)
        return Decisions._make([*fields, inside_BxK.astype(np.float32)])


def title_decisions(trie: ItemTrie, forced: bool = False) -> RaggedDecisions:
    """The decisions of each item's title, of a compressed trie; positions count its tokens.

    With `forced`, of a trie token by token, every token of a title counts as decided.
    """
    path_IxK = trie.paths_QxK[trie.leaf_of_item]
    next_IxK = np.concatenate([path_IxK[:, 1:], np.full_like(path_IxK[:, :1], -1)], axis=1)
    decided = (path_IxK >= 0) & (trie.child_count[path_IxK] > (0 if forced else 1))
    node, child = path_IxK[decided], next_IxK[decided]
    counts = decided.sum(axis=1)
    position, child = trie.depth[node], child - trie.child_start[node]
    fields = (position, np.zeros_like(node), node, child)
    return RaggedDecisions(*(Ragged.from_lengths(field, counts) for field in fields))


class Targets(NamedTuple):
    """What a batch supervises; padding has weight 0.

    Attributes:
      position: int32 [B, T], the places in the row's sequence whose next token is supervised.
      label: int32 [B, T], that next token.
      weight: float32 [B, T].
      title_weight: float32 [B, P], 1 for every supervised title.
      decisions: of the supervised titles.
    """

    position: Array
    label: Array
    weight: Array
    title_weight: Array
    decisions: Decisions

    @classmethod
    def of_titles(cls, label_BxT: np.ndarray, weight_BxT: np.ndarray, decisions: Decisions):
        """One supervised title a row, from its first token on, for states [B, T, ...] of its own.

        Labels are the title's tokens (int32), its end token included, with float32 weights, 0 for
        padding; decisions those of the target items, `title_decisions(compressed).pad(items)`.
        """
        batch, length = label_BxT.shape
        position_BxT = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
        title_weight = np.ones((batch, 1), np.float32)
        return cls(position_BxT, label_BxT, weight_BxT, title_weight, decisions)
