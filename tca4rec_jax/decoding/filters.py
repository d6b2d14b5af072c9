"""Which items may be recommended to whom: without the user's history; allow- and deny-lists.

The search masks the trie and drops nothing from a finished list: a user gets as many items as the
catalogue of the allowed items holds.

Axis letters: R rows, B rows of a batch, I items.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class ItemFilter:
    """The items that may be recommended.

    Attributes:
      allowed_I: bool, for everyone.
      exclude_history: whether all items of a user's own history are left out, by item (another item
        with the same title stays).
    """

    allowed_I: np.ndarray
    exclude_history: bool = False

    @classmethod
    def from_config(cls, decoding, catalogue: Catalogue) -> "ItemFilter":
        """From config.decoding: `exclude_history`, and `allow` and `deny`, files of item ids.

        Raises FileNotFoundError or UserError naming a file that is missing or lists no item, or
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
        """From item indices; UserError if no item is left or one is not in the catalogue."""
        allowed_I = np.full(num_items, allow is None)
        for items, value in ((allow, True), (deny, False)):
            chosen = np.asarray([] if items is None else list(items), np.int64)
            if ((chosen < 0) | (chosen >= num_items)).any():
                raise UserError(f"items must lie in 0..{num_items - 1}, got {chosen.tolist()}")
            allowed_I[chosen] = value
        if not allowed_I.any():
            raise UserError("the allow- and deny-lists leave no item that may be recommended")
        return cls(allowed_I, exclude_history)

    def masks(self, histories: Ragged) -> Callable[[np.ndarray], np.ndarray] | None:
        """The masks of rows for `engine.SearchRows`.

        Args:
          histories: the items of each row's whole history.

        Returns:
          A function: rows int64 [B] -> bool [B, I]; None if everything is allowed.
        """
        if self.allowed_I.all() and not self.exclude_history:
            return None

        def of_rows(rows_B: np.ndarray) -> np.ndarray:
            allowed_BxI = np.tile(self.allowed_I, (len(rows_B), 1))
            if self.exclude_history:
                allowed_BxI &= ~membership(histories.take(rows_B), self.allowed_I.size)
            return allowed_BxI

        return of_rows


def membership(items: Ragged, num_items: int) -> np.ndarray:
    """bool [R, I]: whether a row has an item."""
    member_RxI = np.zeros((len(items), num_items), bool)
    member_RxI[np.repeat(np.arange(len(items)), items.lengths), items.values] = True
    return member_RxI


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
