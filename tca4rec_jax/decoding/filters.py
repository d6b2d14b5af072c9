"""Which items may be recommended to whom: the user's history left out, allow- and deny-lists.

The trie is masked, nothing is dropped from a finished list: a user gets as many items as the
catalogue of the allowed items holds.

Axis letters: R rows, B rows of a batch, H history items, I items.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """What may be recommended.

    Attributes:
      allowed_I: bool, for everyone.
      exclude_history: whether a user's own history is left out, by item (another item that shares
        a title with one of it stays).
    """

    allowed_I: np.ndarray
    exclude_history: bool = False

    @classmethod
    def from_config(cls, decoding, catalogue: Catalogue) -> "ItemFilter":
        """From config.decoding: `exclude_history`, and `allow` and `deny`, files of item ids.

        Raises FileNotFoundError or ValueError naming a file that is missing or lists no item, or
        the line of an id that is not in the catalogue.
        """
        files = (decoding.allow, decoding.deny)
        lists = [read_items(path, catalogue) if path else None for path in files]
        return cls.of_items(catalogue.num_items, *lists, exclude_history=decoding.exclude_history)

    @classmethod
    def of_items(
        cls,
        num_items: int,
        allow: Iterable[int] | None = None,
        deny: Iterable[int] | None = None,
        *,
        exclude_history: bool = False,
    ) -> "ItemFilter":
        """From item indices; ValueError if no item is left or one is not in the catalogue."""
        allowed_I = np.full(num_items, allow is None)
        for items, value in ((allow, True), (deny, False)):
            chosen = np.asarray([] if items is None else list(items), np.int64)
            if ((chosen < 0) | (chosen >= num_items)).any():
                raise UserError(f"items must lie in 0..{num_items - 1}, got {chosen.tolist()}")
            allowed_I[chosen] = value
        if not allowed_I.any():
            raise UserError("the allow- and deny-lists leave no item that may be recommended")
        return cls(allowed_I, exclude_history)

    def masks(self, history_RxH: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
        """For BatchedSearch: rows int64 [B] -> bool [B, I]; None if everything is allowed."""
        if self.allowed_I.all() and not self.exclude_history:
            return None
        return lambda rows_B: self._mask(history_RxH[rows_B])

    def _mask(self, history_BxH: np.ndarray) -> np.ndarray:
        allowed_BxI = np.tile(self.allowed_I, (len(history_BxH), 1))
        if self.exclude_history:
            row, column = np.nonzero(history_BxH != PAD_ITEM)
            allowed_BxI[row, history_BxH[row, column]] = False
        return allowed_BxI


def read_items(path: str | Path, catalogue: Catalogue) -> np.ndarray:
    """Item indices int32 of a text file with one item id per line; empty lines are skipped."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist (expected a file with one item id per line)"
        )
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    numbers = [number for number, line in enumerate(lines) if line]
    if not numbers:
        raise UserError(f"{path} lists no item: expected one item id per line")
    found = catalogue.find([lines[number] for number in numbers])
    if (found < 0).any():
        number = numbers[int(np.argmax(found < 0))]
        raise UserError(
            f"{path}, line {number + 1}: {lines[number]!r} is no item id of the catalogue of "
            f"{catalogue.num_items} items"
        )
    return found
