"""The catalogue: the items that may be recommended, their ids and their titles."""

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

    Two items may share a title (different ids): they then share a leaf of the trie. Raises
    UserError for no items, a number of titles that differs, a duplicated id or an empty title.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]

    def __post_init__(self):
        if not self.item_ids:
            raise UserError("the catalogue has no items")
        if len(self.titles) != self.num_items:
            counts = f"{self.num_items} item ids but {len(self.titles)} titles"
            raise UserError(f"the catalogue has {counts}: every item needs exactly one title")
        surplus = np.flatnonzero(self._index.duplicated())
        if surplus.size:
            raise UserError(
                f"item id {self.item_ids[surplus[0]]!r} occurs more than once in the catalogue "
                f"(again at item {surplus[0]}; {surplus.size} surplus in all); keep one per item"
            )
        for at, (item_id, title) in enumerate(zip(self.item_ids, self.titles, strict=True)):
            if not title.strip():
                raise UserError(
                    f"item {item_id!r} (index {at}) has an empty title; give it one or drop it"
                )

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.item_ids)

    @functools.cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.item_ids, dtype=object)

    def find(self, item_ids: Iterable[str]) -> np.ndarray:
        """The indices of n item ids: int32 [n], -1 for an unknown id."""
        return self._index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int32)

    def content_hash(self) -> str:
        """SHA-256 (hex) of ids and titles in order; equal catalogues have equal hashes."""
        digest = hashlib.sha256(str(self.num_items).encode())
        for text in map(str.encode, (*self.item_ids, *self.titles)):
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()
