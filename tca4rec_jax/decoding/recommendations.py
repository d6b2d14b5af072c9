"""What a search found, by row: titles, and the items that have them.

Axis letters: R rows, M beams, K places of a list.
"""

from dataclasses import dataclass

import numpy as np

from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.trie import ItemTrie


@dataclass(frozen=True, eq=False)
class Recommendations:
    """The best titles of each row, best first.

    Attributes:
      leaves_RxM: int32, leaves of the trie (distinct titles), -1 where there are no more.
      scores_RxM: float32, -inf where there are no more.
    """

    leaves_RxM: np.ndarray
    scores_RxM: np.ndarray

    def items(
        self, trie: ItemTrie, count: int, allowed_RxI: np.ndarray | None = None
    ) -> np.ndarray:
        """The first `count` items of each row; see `leaves_to_items`."""
        return leaves_to_items(self.leaves_RxM, trie, count, allowed_RxI)


def leaves_to_items(
    leaves_RxM: np.ndarray, trie: ItemTrie, count: int, allowed_RxI: np.ndarray | None = None
) -> np.ndarray:
    """int32 [R, count]: the items of the leaves in turn, -1 where there are no more.

    Items that share a title share a leaf; they follow one another in catalogue order. Those that
    allowed_RxI (bool) leaves out are passed over.
    """
    items_I, offsets = trie.items_by_leaf
    present_RxM = leaves_RxM >= 0
    leaf_RxM = np.maximum(leaves_RxM, 0)
    sizes_RxM = np.where(present_RxM, offsets[leaf_RxM + 1] - offsets[leaf_RxM], 0)
    flat = items_I[ranges(offsets[leaf_RxM].ravel(), sizes_RxM.ravel())]
    lengths_R = sizes_RxM.sum(axis=1)
    if allowed_RxI is not None:
        row_of_item = np.repeat(np.arange(len(lengths_R)), lengths_R)
        kept = allowed_RxI[row_of_item, flat]
        flat = flat[kept]
        lengths_R = np.bincount(row_of_item[kept], minlength=len(lengths_R))
    rows = Ragged.from_lengths(flat, lengths_R)
    kept_R = np.minimum(rows.lengths, count)
    rows = Ragged.from_lengths(flat[ranges(rows.offsets[:-1], kept_R)], kept_R)
    return rows.pad(np.arange(len(rows)), count, -1)
