"""The catalogue: the items that may be recommended, their ids and their titles.

Axis letters: I items.
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tca4rec_jax.errors import UserError


@dataclass(frozen=True)
class Catalogue:
    """Items in a fixed order; an item's index (0..I-1) is its position.

    Two items may share a title (different ids): they then share a leaf of the trie.

    Raises:
      UserError: no items, ids and titles of different number, a duplicated item id, or an
        empty title.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]

    def __post_init__(self):
        if not self.item_ids:
            raise UserError("the catalogue has no items")
        if len(self.item_ids) != len(self.titles):
            raise UserError(
                f"the catalogue has {len(self.item_ids)} item ids but {len(self.titles)} titles; "
                "every item needs exactly one title"
            )
        duplicated = pd.Series(self.item_ids).duplicated()
        if duplicated.any():
            at = int(np.flatnonzero(duplicated)[0])
            raise UserError(
                f"item id {self.item_ids[at]!r} occurs more than once in the catalogue (again at "
                f"item {at}; {int(duplicated.sum())} surplus in all); keep one entry per item"
            )
        for at, title in enumerate(self.titles):
            if not title.strip():
                raise UserError(
                    f"item {self.item_ids[at]!r} (index {at}) has an empty title; give it a "
                    "title or leave the item out of the catalogue"
                )

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)

    @property
    def num_distinct_titles(self) -> int:
        """Q, at most I."""
        return len(set(self.titles))

    @functools.cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.item_ids, dtype=object)

    def find(self, item_ids: Iterable[str]) -> np.ndarray:
        """The indices of n item ids: int32 [n], -1 for an unknown id."""
        return self._index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int32)

    def content_hash(self) -> str:
        """SHA-256 (hex) of ids and titles in order; equal catalogues have equal hashes."""
        digest = hashlib.sha256(str(self.num_items).encode())
        for text in (*self.item_ids, *self.titles):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()
