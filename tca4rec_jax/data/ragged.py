"""Rows of unequal length in one flat array, and their padded views."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


class Rows:
    """Rows of unequal length that lie one after the other, divided by `offsets`: int64 [R + 1]."""

    offsets: np.ndarray

    def __len__(self) -> int:
        return self.offsets.size - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]."""
        return np.diff(self.offsets)

    def row_of(self, position: np.ndarray | int) -> np.ndarray:
        """int64, shaped as `position`: the rows that hold these positions of the flat arrays."""
        return np.searchsorted(self.offsets, position, side="right") - 1


@dataclass(frozen=True, eq=False)
class Ragged(Rows):
    """R rows, n values: row r is values[offsets[r]:offsets[r + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray], dtype: type = np.int64) -> "Ragged":
        """Rows of whole numbers."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls.from_lengths(np.fromiter(chain.from_iterable(rows), dtype), lengths)

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths_R: np.ndarray) -> "Ragged":
        """Rows of these lengths (int), one after the other in values [n]."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths_R, dtype=np.int64)]))

    @classmethod
    def stack(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of several Raggeds, one after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls.from_lengths(np.concatenate([part.values for part in parts]), lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[:-1][row] : self.offsets[1:][row]]

    def take(self, rows_B: np.ndarray, most: int | None = None) -> "Ragged":
        """The given rows, in the given order; of each the first `most` values, by default all."""
        starts = self.offsets[:-1][rows_B]
        lengths = self.offsets[1:][rows_B] - starts
        if most is not None:
            lengths = np.minimum(lengths, most)
        return Ragged.from_lengths(self.values[ranges(starts, lengths)], lengths)

    def followed_by(self, other: "Ragged") -> "Ragged":
        """Every row, followed by the row of the same number of another Ragged."""
        starts = np.stack([self.offsets[:-1], self.values.size + other.offsets[:-1]], axis=1)
        lengths = np.stack([self.lengths, other.lengths], axis=1)
        values = np.concatenate([self.values, other.values])
        values = values[ranges(starts.ravel(), lengths.ravel())]
        return Ragged.from_lengths(values, lengths.sum(axis=1))

    def pad(self, rows_B: np.ndarray, width: int, fill: float) -> np.ndarray:
        """[B, width]: the given rows, filled up with `fill`; ValueError if one is longer."""
        lengths_B = self.lengths[rows_B]
        if lengths_B.size and lengths_B.max() > width:
            row = rows_B[int(np.argmax(lengths_B))]
            raise ValueError(f"row {row} has {lengths_B.max()} entries, more than {width}")
        column = np.arange(width)
        inside = column < lengths_B[:, None]
        padded = np.full(inside.shape, fill, self.values.dtype)
        padded[inside] = self.values[(self.offsets[rows_B][:, None] + column)[inside]]
        return padded

    def latest(self, rows_B: np.ndarray, width: int, fill: int) -> np.ndarray:
        """[B, width]: the last values of the given rows, filled up with `fill` on the left."""
        flat = self.offsets[rows_B + 1][:, None] + np.arange(-width, 0)
        inside = flat >= self.offsets[rows_B][:, None]
        return np.where(inside, self.values[np.maximum(flat, 0)], self.values.dtype.type(fill))


def ranges(starts_R: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    """int64: start, start + 1, .. for `length` steps, of every row, one after the other."""
    ends_R = np.cumsum(lengths_R, dtype=np.int64)
    total = int(ends_R[-1]) if ends_R.size else 0
    return np.arange(total) + np.repeat(starts_R - (ends_R - lengths_R), lengths_R)


def ragged_arrays(**rows: Ragged) -> dict[str, np.ndarray]:
    """{'name_values' | 'name_offsets': array} of Raggeds by name: what a file holds of them."""
    parts = ((name, part) for name in rows for part in ("values", "offsets"))
    return {f"{name}_{part}": getattr(rows[name], part) for name, part in parts}


def raggeds(arrays: Mapping[str, np.ndarray]) -> dict[str, Ragged]:
    """The Raggeds by name that `ragged_arrays` was given."""
    names = dict.fromkeys(name.rpartition("_")[0] for name in arrays)
    return {name: Ragged(arrays[f"{name}_values"], arrays[f"{name}_offsets"]) for name in names}
