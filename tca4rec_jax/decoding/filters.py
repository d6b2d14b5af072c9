"""Which items may be recommended to whom: without the user's history; allow- and deny-lists.

The search masks the trie and drops nothing from a finished list: a user gets as many items as the
catalogue of the allowed items holds.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.data.table_files import read_text
from tca4rec_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """The items that may be recommended (bool), to a user perhaps without those of the history.

    Another item with the title of one in the history stays.
    """

    allowed_I: np.ndarray
    exclude_history: bool = False

    @classmethod
    def from_config(cls, decoding, data: RecData) -> "ItemFilter":
        """From config.decoding: `exclude_history`, and `allow` and `deny`, files of item ids.

        Whether histories are excluded is by default what the training data show: whether anybody
        has an item twice. Raises as `read_items`, and UserError if no item is left.
        """
        catalogue, exclude_history = data.catalogue, decoding.exclude_history
        allowed_I = np.full(catalogue.num_items, not decoding.allow)
        for path, value in ((decoding.allow, True), (decoding.deny, False)):
            if path:
                allowed_I[read_items(path, catalogue)] = value
        if not allowed_I.any():
            raise UserError("the allow- and deny-lists leave no item that may be recommended")
        if exclude_history is None:
            exclude_history = not data.splits["train_sequences"].repeat_items
        return cls(allowed_I, exclude_history)

    def only(self, allowed_I: np.ndarray) -> "ItemFilter":
        """Of the items that may be recommended only these (bool).

        Raises UserError if there are none.
        """
        allowed_I = self.allowed_I & allowed_I
        if not allowed_I.any():
            raise UserError("decoding leaves no item that may be recommended")
        return ItemFilter(allowed_I, self.exclude_history)

    def content_hash(self) -> str:
        """SHA-256 (hex) of which items are allowed and whether histories are excluded."""
        flags = np.append(self.allowed_I, self.exclude_history)
        return hashlib.sha256(flags.astype(bool).tobytes()).hexdigest()

    def masks(self, histories: Ragged) -> Callable[[np.ndarray], np.ndarray] | None:
        """Of rows with these whole histories: rows int64 [B] -> bool [B, I]; None allows all."""
        if self.allowed_I.all() and not self.exclude_history:
            return None
        return masks_of([self] * len(histories), histories)


def masks_of(
    filters: Sequence[ItemFilter], histories: Ragged
) -> Callable[[np.ndarray], np.ndarray]:
    """`ItemFilter.masks` of rows with a filter each, whatever these allow."""
    exclude_R = np.array([one.exclude_history for one in filters])

    def of_rows(rows_B: np.ndarray) -> np.ndarray:
        allowed_BxI = np.stack([filters[row].allowed_I for row in rows_B])
        taken = histories.take(rows_B)
        row_n, item_n = taken.row_of(np.arange(taken.values.size)), taken.values
        excluded_n = exclude_R[rows_B][row_n]
        allowed_BxI[row_n[excluded_n], item_n[excluded_n]] = False
        return allowed_BxI

    return of_rows


def read_items(path: str | Path, catalogue: Catalogue) -> np.ndarray:
    """Item indices int32 of a text file with one item id per line; empty lines are skipped.

    Raises FileNotFoundError, or UserError naming the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (a file with one item id per line)")
    lines = map(str.strip, read_text(path).splitlines())
    ids = {number: line for number, line in enumerate(lines, start=1) if line}
    if not ids:
        raise UserError(f"{path} lists no item: expected one item id per line")
    found = catalogue.find(ids.values())
    for number, item in zip(ids, found, strict=True):
        if item < 0:
            raise UserError(f"{path}, line {number}: the catalogue has no item {ids[number]!r}")
    return found
