"""Rows of items, oldest first, in flat arrays; and the data set made of them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged, Rows, ranges
from tca4rec_jax.errors import UserError

PAD_ITEM = -1
"""Fills the left of a history that is shorter than asked for; never an item index."""

UNKNOWN_TIME = -1
"""The timestamp of an interaction whose time is not known."""

_ROWS_AT_ONCE = 1 << 16

SPLITS = ("train_sequences", "train", "validation", "test")
"""train_sequences: one row per user of the training period. The others: history + target."""
TRAINING_SPLITS = ("train_sequences", "train")


@dataclass(frozen=True, eq=False)
class ItemSequences(Rows):
    """R rows of at least one item each, n in all: row r is items[offsets[r]:offsets[r + 1]].

    In the splits train, validation and test the last item of a row is the target and the items
    before it are the history. Raises ValueError for arrays that do not fit together, an empty row,
    a negative item or user, or a timestamp below UNKNOWN_TIME.
    """

    user: np.ndarray  # int32 [R], the user of each row (a user may own several rows)
    items: np.ndarray  # int32 [n], item indices 0..I-1
    offsets: np.ndarray  # int64 [R + 1]
    timestamps: np.ndarray  # int64 [n], seconds, UNKNOWN_TIME where not known
    liked: np.ndarray | None = None  # bool [n], whether the user liked the item; None: not known

    def __post_init__(self):
        for name in ("user", "items", "offsets", "timestamps"):
            dtype = np.int32 if name in ("user", "items") else np.int64
            least = UNKNOWN_TIME if name == "timestamps" else 0
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
                found = f"shape {array.shape} of {array.dtype}"
                raise ValueError(f"{name} must be a one-dimensional array of integers, got {found}")
            most = np.iinfo(dtype).max
            if array.size and (array.min() < least or array.max() > most):
                at = int(np.argmax((array < least) | (array > most)))
                raise UserError(f"{name}[{at}] is {array[at]}, expected {least}..{most}")
            object.__setattr__(self, name, np.ascontiguousarray(array, dtype))
        offsets, num_rows, num_items = self.offsets, len(self.user), len(self.items)
        if len(offsets) != num_rows + 1:
            raise ValueError(f"{num_rows} rows need {num_rows + 1} offsets, got {len(offsets)}")
        if (offsets[0], offsets[-1]) != (0, num_items):
            ends = f"{offsets[0]} to {offsets[-1]}"
            raise ValueError(f"offsets run from 0 to the number of items {num_items}, not {ends}")
        if len(self.timestamps) != num_items:
            raise ValueError(f"{num_items} items but {len(self.timestamps)} timestamps")
        if self.liked is not None and self.liked.shape != (num_items,):
            raise ValueError(f"{num_items} items but {self.liked.shape} that are liked or not")
        if num_rows and self.lengths.min() < 1:
            raise UserError(f"row {np.argmax(self.lengths < 1)} has no item; leave empty rows out")

    def __getitem__(self, row: int) -> np.ndarray:
        """The items of one row, oldest first: int32 [length of the row]."""
        return self.items[self.offsets[:-1][row] : self.offsets[1:][row]]

    @property
    def num_items(self) -> int:
        """Of all rows together."""
        return len(self.items)

    @property
    def rated(self) -> bool:
        """Whether it is known which items are liked."""
        return self.liked is not None

    @property
    def repeat_items(self) -> bool:
        """Whether a row has an item twice."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            part = self.between(start, min(start + _ROWS_AT_ONCE, len(self)))
            pair_n = np.repeat(np.arange(len(part)) << 32, part.lengths)  # row and item in one
            pair_n += part.items
            pair_n.sort()
            if np.any(pair_n[1:] == pair_n[:-1]):
                return True
        return False

    @property
    def last_positions(self) -> np.ndarray:
        """int64 [R], the flat position of each row's last item (the target)."""
        return self.offsets[1:] - 1

    @property
    def has_times(self) -> bool:
        """Whether the time of any item before a target is known."""
        known = self.timestamps != UNKNOWN_TIME
        known[self.last_positions] = False
        return bool(known.any())

    @property
    def tied(self) -> np.ndarray:
        """bool [R]: the target shares its (known) timestamp with the item before it."""
        last = self.last_positions
        time = self.timestamps[last]  # of a row of one item, last - 1 may be in another row
        return (time == self.timestamps[last - 1]) & (time != UNKNOWN_TIME) & (self.lengths > 1)

    def take(self, rows: np.ndarray) -> "ItemSequences":
        """The given rows (int [m], or bool [R] as a mask) in the given order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}")
        start_R, end_R = self.offsets[:-1][rows], self.offsets[1:][rows]
        positions = Ragged.from_lengths(ranges(start_R, end_R - start_R), end_R - start_R)
        at = positions.values
        liked = None if self.liked is None else self.liked[at]
        items, timestamps = self.items[at], self.timestamps[at]
        return ItemSequences(self.user[rows], items, positions.offsets, timestamps, liked)

    def between(self, start: int, stop: int) -> "ItemSequences":
        """The rows start, .., stop - 1, which share memory with these."""
        first, end = self.offsets[start], self.offsets[stop]
        liked = None if self.liked is None else self.liked[first:end]
        items, timestamps = self.items[first:end], self.timestamps[first:end]
        offsets = self.offsets[start : stop + 1] - first
        return ItemSequences(self.user[start:stop], items, offsets, timestamps, liked)

    def copied(self) -> "ItemSequences":
        """Itself: as Windows.copied."""
        return self

    def of_items(self, kept_n: np.ndarray) -> "ItemSequences":
        """Some of the items (bool [n]), in rows as before; rows without any are left out."""
        row_n = self.row_of(np.flatnonzero(kept_n))
        rows, lengths = np.unique(row_n, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        liked = None if self.liked is None else self.liked[kept_n]
        items, timestamps = self.items[kept_n], self.timestamps[kept_n]
        return ItemSequences(self.user[rows], items, offsets, timestamps, liked)

    def histories_and_targets(self, history_length: int) -> tuple[np.ndarray, np.ndarray]:
        """The items before each row's last one, int32 [R, history_length], and the last, int32 [R].

        A history has the most recent items, oldest first, padded on the left with PAD_ITEM.
        """
        if history_length < 1:
            raise UserError(f"history_length must be at least 1, got {history_length}")
        rows = Ragged(self.items, self.offsets)
        latest = rows.latest(np.arange(len(self)), history_length + 1, PAD_ITEM)
        return latest[:, :-1], latest[:, -1]

    def content_hash(self) -> str:
        """SHA-256 (hex) of users, items, row boundaries, timestamps and what is liked."""
        digest = hashlib.sha256(f"{len(self)} {len(self.items)}".encode())
        for array in (self.user, self.items, self.offsets, self.timestamps):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        if self.liked is not None:
            digest.update(self.liked.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class RecData:
    """A catalogue and the splits named in SPLITS, whose items are indices into it.

    `user_ids` are the ids of the users 0..U-1; () if the numbers of the users are their ids, None
    if the data were written without them. Raises ValueError for a missing or unknown split, and for
    splits in a dict as `checked_split` does, as a SplitReader does when they are read.
    """

    catalogue: Catalogue
    splits: Mapping[str, ItemSequences]
    user_ids: tuple[str, ...] | None = ()

    def __post_init__(self):
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"expected the splits {list(SPLITS)}, got {sorted(self.splits)}")
        if isinstance(self.splits, dict):
            for name, sequences in self.splits.items():
                checked_split(name, sequences, self.catalogue)


class SplitReader(Mapping[str, ItemSequences]):
    """The splits of a data set, each read and checked when it is first asked for."""

    def __init__(self, read: Callable[[str], ItemSequences], catalogue: Catalogue):
        self._read = cache(lambda name: checked_split(name, read(name), catalogue))

    def __getitem__(self, name: str) -> ItemSequences:
        if name not in SPLITS:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self):
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


def checked_split(name: str, sequences: ItemSequences, catalogue: Catalogue) -> ItemSequences:
    """The split; raises UserError if it has no rows, or an item outside the catalogue."""
    check_has_rows(name, len(sequences))
    at = int(np.argmax(sequences.items))
    if sequences.items[at] >= catalogue.num_items:
        raise UserError(
            f"row {sequences.row_of(at)} of the split {name!r} has item index "
            f"{sequences.items[at]}, but the catalogue has {catalogue.num_items} items (0..I-1)"
        )
    return sequences


def check_has_rows(name: str, count: int) -> None:
    """Raises UserError for a split without rows."""
    if not count:
        raise UserError(f"the split {name!r} has no rows; check data.split and the history length")
