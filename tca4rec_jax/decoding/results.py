"""The titles that a search found for each row, and the items that have these titles.

Axes: core/__init__.py; here T are temperatures, n the items of some rows, K the first of a row.
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_npz, write_npz

_PAIRS = 1 << 22  # of rows and items that are looked at together, at most


class Recommendations(NamedTuple):
    """The best titles of each row, best first; a search fills the arrays in place."""

    leaves_RxM: np.ndarray  # int32, leaves of the trie (titles), -1 where there are no more
    scores_RxM: np.ndarray  # float32, -inf where there are no more
    nll_RxT: np.ndarray  # float32, -log P_LLM(target's title | prompt), NaN where not known yet

    @classmethod
    def empty(cls, rows: int, beams: int, temperatures: int) -> "Recommendations":
        """Arrays of these sizes in which nothing is found yet."""
        return cls(
            np.full((rows, beams), -1, np.int32),
            np.full((rows, beams), -np.inf, np.float32),
            np.full((rows, temperatures), np.nan, np.float32),
        )

    def items(
        self,
        trie: ItemTrie,
        count: int,
        allowed: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """int32 [R, count]: the items of the titles in turn, -1 where there are no more.

        Items that share a title follow one another in catalogue order; those that are not
        `allowed` (row numbers int64 [B] -> bool [B, I]) are passed over.
        """
        num_rows, beams = self.leaves_RxM.shape
        most = count if allowed is None else None  # of a title
        of_row = trie.num_items if most is None else max(beams * most, 1)
        at_once = max(_PAIRS // of_row, 1)
        items_RxK = np.full((num_rows, count), -1, np.int32)
        for start in range(0, num_rows, at_once):
            leaves_BxM = self.leaves_RxM[start : start + at_once]
            row_n, place_n = np.nonzero(leaves_BxM >= 0)
            of_leaf = trie.items_by_leaf.take(leaves_BxM[row_n, place_n], most)
            item_n, row_n = of_leaf.values, np.repeat(row_n, of_leaf.lengths)
            if allowed is not None and item_n.size:
                some_B, place_n = np.unique(row_n, return_inverse=True)
                kept_n = allowed(start + some_B)[place_n, item_n]
                item_n, row_n = item_n[kept_n], row_n[kept_n]
            rows_B = np.arange(len(leaves_BxM))
            listed = Ragged.from_lengths(item_n, np.bincount(row_n, minlength=len(rows_B)))
            items_RxK[start + rows_B] = listed.take(rows_B, count).pad(rows_B, count, -1)
        return items_RxK


def read_cache(
    path: Path, identity: str, names: Collection[str], *, also: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of these names in an .npz file of this `identity`; {} if there is none such.

    With those of `also` that it has: an older file may be without. One that is damaged, as after a
    crash, is named in a warning: what it held is made anew.
    """
    try:
        saved = read_npz(path, remedy="it is made anew") if path.exists() else {}
    except UserError as error:
        logging.warning("%s", error)
        return {}
    is_whole = str(saved.get("identity")) == identity and saved.keys() >= {*names}
    return {name: saved[name] for name in (*names, *also) if name in saved} if is_whole else {}


class ResultsFile:
    """The file from which an interrupted search of a single process is resumed.

    Attributes:
      earlier: seconds that went, in other processes, into what was read.
    """

    def __init__(self, path: Path, identity: str, *, every_seconds: float = 60.0):
        """identity: of all that the results depend on; a file with another one is replaced."""
        self._path, self._identity, self._every = path, identity, every_seconds
        self._began = self._written = time.monotonic()
        self.earlier = 0.0

    @property
    def seconds(self) -> float:
        """How long the search has taken so far, since this file was named, and earlier."""
        return self.earlier + time.monotonic() - self._began

    def read(self, results: Any) -> np.ndarray:
        """Fills a tree of arrays [R, ..]; returns the rows that are done, bool [R].

        A damaged file counts as none, with a warning.
        """
        arrays = jax.tree.leaves(results)
        names = [f"array_{number}" for number in range(len(arrays))]
        saved = read_cache(self._path, self._identity, [*names, "done_R"], also=["seconds"])
        self.earlier = float(saved.get("seconds", 0.0))
        for name, array in zip(names, arrays, strict=True) if saved else ():
            array[...] = saved[name]
        return saved.get("done_R", np.zeros(len(arrays[0]), bool))

    def write(self, results: Any, done_R: np.ndarray) -> None:
        """Saves the arrays, if `every_seconds` have passed since the last time."""
        if time.monotonic() - self._written < self._every:
            return
        arrays = {f"array_{n}": array for n, array in enumerate(jax.tree.leaves(results))}
        seconds = self.seconds
        write_npz(self._path, identity=self._identity, done_R=done_R, seconds=seconds, **arrays)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Deletes the file: the search is done and its results are kept elsewhere."""
        self._path.unlink(missing_ok=True)
