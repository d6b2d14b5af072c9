"""What a search found, by row: titles, and the items that have them.

Axis letters: R rows, M beams, K places of a list, U sets of score weights, T temperatures.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged, ranges


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


class Sweep(NamedTuple):
    """What one pass over the prompts found with a model.

    Attributes:
      recommendations: one for each set of weights.
      nll_RxT: float32, -log P_LLM(target title | prompt) at each temperature; None if not asked.
    """

    recommendations: list[Recommendations]
    nll_RxT: np.ndarray | None


class Found(NamedTuple):
    """What a model has found so far: a Sweep in the making."""

    leaves_RxUxM: np.ndarray
    scores_RxUxM: np.ndarray
    nll_RxT: np.ndarray

    @classmethod
    def of_nothing(cls, shape: tuple[int, int, int], temperatures: int) -> "Found":
        return cls(
            np.full(shape, -1, np.int32),
            np.full(shape, -np.inf, np.float32),
            np.full((shape[0], temperatures), np.nan, np.float32),
        )

    def put(self, rows_B: np.ndarray, searched, nll_BxT: np.ndarray | None) -> None:
        """(leaves, scores) [B, M] of each set of weights; what is behind the rows is left out."""
        for number, (leaves_BxM, scores_BxM) in enumerate(searched):
            self.leaves_RxUxM[rows_B, number] = leaves_BxM[: len(rows_B)]
            self.scores_RxUxM[rows_B, number] = scores_BxM[: len(rows_B)]
        if nll_BxT is not None:
            self.nll_RxT[rows_B] = nll_BxT[: len(rows_B)]

    def sweep(self, with_nll: bool) -> Sweep:
        by_weights = zip(
            self.leaves_RxUxM.swapaxes(0, 1), self.scores_RxUxM.swapaxes(0, 1), strict=True
        )
        found = [Recommendations(*one) for one in by_weights]
        return Sweep(found, self.nll_RxT if with_nll else None)


class SweepFile:
    """Where an interrupted sweep of a single process goes on."""

    def __init__(self, path: Path, identity: str, *, every_seconds: float = 60.0):
        """identity: of all that the results depend on; a file with another one is written over."""
        self._path, self._identity, self._every = path, identity, every_seconds
        self._written = time.monotonic()

    def read(self, found: Sequence[Found]) -> np.ndarray:
        """Puts what is there into `found`; bool [R], the rows that are done."""
        done_R = np.zeros(len(found[0].nll_RxT), bool)
        if not self._path.exists():
            return done_R
        with np.load(self._path) as saved:
            if str(saved["identity"]) != self._identity:
                return done_R
            for number, one in enumerate(found):
                for name, values in one._asdict().items():
                    values[...] = saved[f"{name}_{number}"]
            return saved["done_R"]

    def write(self, found: Sequence[Found], done_R: np.ndarray) -> None:
        """Keeps what there is, if some time has passed since it was last kept."""
        if time.monotonic() - self._written < self._every:
            return
        arrays = {
            f"{name}_{number}": values
            for number, one in enumerate(found)
            for name, values in one._asdict().items()
        }
        write_arrays(self._path, identity=self._identity, done_R=done_R, **arrays)
        self._written = time.monotonic()

    def remove(self) -> None:
        """The sweep is done and kept elsewhere."""
        self._path.unlink(missing_ok=True)


def write_arrays(path: Path, **arrays) -> None:
    """An .npz file that is there whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(beside, path)
