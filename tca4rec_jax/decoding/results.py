"""The titles that a search found for each row, and the items that have these titles.

Axis letters: R rows, B rows of a batch, M beams, X items of a list, G sets of score weights,
T temperatures, I items.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.fileio import write_npz


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
        """int32 [R, count]: the items of the titles in turn, -1 where there are no more.

        Items that share a title follow one another in catalogue order.

        Args:
          allowed_RxI: bool, the items that may be recommended; the others are passed over.
        """
        items_I, offsets = trie.items_by_leaf
        present_RxM = self.leaves_RxM >= 0
        leaf_RxM = np.maximum(self.leaves_RxM, 0)
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


class SearchResults(NamedTuple):
    """What one model found for the rows; a search fills the arrays in place.

    Attributes:
      leaves_RxGxM, scores_RxGxM: as in Recommendations, for each set of score weights.
      nll_RxT: float32, -log P_LLM(target's title | prompt) at each temperature; NaN where it is not
        known yet, and no column if no target was given.
    """

    leaves_RxGxM: np.ndarray
    scores_RxGxM: np.ndarray
    nll_RxT: np.ndarray

    @classmethod
    def empty(cls, rows: int, weights: int, beams: int, temperatures: int) -> "SearchResults":
        """Results of these sizes in which nothing is found yet."""
        return cls(
            np.full((rows, weights, beams), -1, np.int32),
            np.full((rows, weights, beams), -np.inf, np.float32),
            np.full((rows, temperatures), np.nan, np.float32),
        )

    def put(self, rows_B: np.ndarray, found: Sequence, nll_BxT: np.ndarray | None) -> None:
        """Stores a batch.

        Args:
          rows_B: int64, its rows; a batch padded to more rows is cut to these.
          found: (leaves, scores) [B, M] for each set of score weights.
        """
        count = len(rows_B)
        for number, (leaves_BxM, scores_BxM) in enumerate(found):
            self.leaves_RxGxM[rows_B, number] = leaves_BxM[:count]
            self.scores_RxGxM[rows_B, number] = scores_BxM[:count]
        if nll_BxT is not None:
            self.nll_RxT[rows_B] = nll_BxT[:count]

    def recommendations(self, weights: int = 0) -> Recommendations:
        """The best titles by one set of score weights, by its number."""
        return Recommendations(self.leaves_RxGxM[:, weights], self.scores_RxGxM[:, weights])


class ResultsFile:
    """The file from which an interrupted search of a single process is resumed."""

    def __init__(self, path: Path, identity: str, *, every_seconds: float = 60.0):
        """identity: of all that the results depend on; a file with another one is replaced."""
        self._path, self._identity, self._every = path, identity, every_seconds
        self._written = time.monotonic()

    def read(self, results: Sequence[SearchResults]) -> np.ndarray:
        """Fills `results` with those of the file; returns the rows that are done, bool [R]."""
        done_R = np.zeros(len(results[0].nll_RxT), bool)
        if not self._path.exists():
            return done_R
        with np.load(self._path) as saved:
            if str(saved["identity"]) != self._identity:
                return done_R
            for number, one in enumerate(results):
                for name, values in one._asdict().items():
                    values[...] = saved[f"{name}_{number}"]
            return saved["done_R"]

    def write(self, results: Sequence[SearchResults], done_R: np.ndarray) -> None:
        """Saves the results, if `every_seconds` have passed since the last time."""
        if time.monotonic() - self._written < self._every:
            return
        arrays = {
            f"{name}_{number}": values
            for number, one in enumerate(results)
            for name, values in one._asdict().items()
        }
        write_npz(self._path, identity=self._identity, done_R=done_R, **arrays)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Deletes the file: the search is done and its results are kept elsewhere."""
        self._path.unlink(missing_ok=True)
