"""Histories of all users by offset: every interaction is stored once, rows are windows on them.

Axis letters: n interactions, sorted by user, then time; R rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences

_ITEMS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Histories:
    """What every user chose, oldest first, in the files of a folder (.npy), read where needed."""

    folder: Path

    def __reduce__(self):
        return Histories, (self.folder,)  # another process opens the files itself

    @cached_property
    def user(self) -> np.ndarray:
        """int32 [n], ascending."""
        return self._column("user")

    @cached_property
    def item(self) -> np.ndarray:
        """int32 [n]."""
        return self._column("item")

    @cached_property
    def timestamp(self) -> np.ndarray:
        """int64 [n]; UNKNOWN_TIME in all of them without times."""
        return self._column("timestamp")

    @cached_property
    def place(self) -> np.ndarray:
        """Int [n], the place of every interaction in the order of time over all users."""
        return self._column("place")

    @cached_property
    def rating(self) -> np.ndarray | None:
        """float32 [n]; None without ratings."""
        return self._column("rating") if (self.folder / "rating.npy").exists() else None

    def _column(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


class RowSource(Protocol):
    """Rows that may be taken apart: ItemSequences, or Windows."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """int [R]."""

    @property
    def num_items(self) -> int:
        """Of all rows together."""

    @property
    def rated(self) -> bool:
        """Whether it is known which items are liked."""

    def take(self, rows: np.ndarray) -> "RowSource":
        """Some of the rows (int [m], or bool [R] as a mask)."""

    def between(self, start: int, stop: int) -> "RowSource":
        """The rows start, .., stop - 1."""

    def copied(self) -> ItemSequences:
        """The rows in arrays of their own."""


@dataclass(frozen=True, eq=False)
class Windows:
    """R rows: row r is the interactions start_R[r] and the following ones, length_R[r] in all.

    Attributes:
      histories: of all users.
      start_R, length_R: int.
      liked_above: with ratings, an item is liked if its rating is above this.
    """

    histories: Histories
    start_R: np.ndarray
    length_R: np.ndarray
    liked_above: float

    def __len__(self) -> int:
        return len(self.start_R)

    @property
    def lengths(self) -> np.ndarray:
        """Int [R]."""
        return self.length_R

    @property
    def num_items(self) -> int:
        """Of all rows together."""
        return int(self.length_R.sum(dtype=np.int64))

    @property
    def rated(self) -> bool:
        """Whether it is known which items are liked."""
        return self.histories.rating is not None

    def take(self, rows: np.ndarray) -> "Windows":
        """Some of the rows (int [m], or bool [R] as a mask), in the given order."""
        bounds = self.start_R[rows], self.length_R[rows]
        return Windows(self.histories, *bounds, self.liked_above)

    def between(self, start: int, stop: int) -> "Windows":
        """The rows start, .., stop - 1."""
        bounds = self.start_R[start:stop], self.length_R[start:stop]
        return Windows(self.histories, *bounds, self.liked_above)

    def copied(self) -> ItemSequences:
        """The rows in arrays of their own."""
        of = self.histories
        positions = Ragged.from_lengths(ranges(self.start_R, self.length_R), self.length_R)
        at = positions.values
        liked = None if of.rating is None else of.rating[at] > self.liked_above
        user_R = of.user[self.start_R]
        return ItemSequences(user_R, of.item[at], positions.offsets, of.timestamp[at], liked)


Splits = Mapping[str, RowSource]


class MadeData(NamedTuple):
    """A RecData whose rows need not be in memory."""

    catalogue: Catalogue
    splits: Splits
    user_ids: tuple[str, ...]


def parts_of(rows: RowSource, most: int = _ITEMS_AT_ONCE) -> Iterator[ItemSequences]:
    """The rows in their order, some at a time: about `most` items, and at least one row."""
    for bounds in even_parts(rows, most):
        yield rows.between(*bounds).copied()


def even_parts(rows: RowSource, most: int) -> list[tuple[int, int]]:
    """First row and end of parts with equally many rows and, on average, at most `most` items."""
    count = max(1, min(len(rows), -(-rows.num_items // most)))
    edges = [len(rows) * part // count for part in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))
