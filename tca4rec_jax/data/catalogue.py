"""The catalogue: the items that may be recommended, their ids and their titles."""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from tca4rec_jax.errors import UserError


@dataclass(frozen=True)
class Catalogue:
    """Items in a fixed order; an item's index (0..I-1) is its position.

    Two items may share a title (different ids): they then share a leaf of the trie. `attributes`
    has other texts of every item by their name, '' where an item has none. Raises UserError for no
    items, a number of titles or attributes that differs, a duplicated id or an empty title.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not self.item_ids:
            raise UserError("the catalogue has no items")
        for name, texts in self.columns.items():
            if len(texts) != self.num_items:
                counts = f"{self.num_items} item ids but {len(texts)} {name}s"
                raise UserError(f"the catalogue has {counts}: every item needs exactly one {name}")
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

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The texts of every item, by the name that a prompt template has for them."""
        return {"title": self.titles, **self.attributes}

    @functools.cached_property
    def _index(self) -> pd.Index:
        return pd.Index(self.item_ids, dtype=object)

    def find(self, item_ids: Iterable[str]) -> np.ndarray:
        """The indices of n item ids: int32 [n], -1 for an unknown id."""
        return self._index.get_indexer(pd.Index(item_ids, dtype=object)).astype(np.int32)

    def take(self, items: np.ndarray) -> "Catalogue":
        """Some of the items (int [m]), in the given order."""
        columns = (self.item_ids, self.titles, *self.attributes.values())
        ids, titles, *texts = (tuple(map(column.__getitem__, items)) for column in columns)
        return Catalogue(ids, titles, dict(zip(self.attributes, texts, strict=True)))

    def content_hash(self) -> str:
        """SHA-256 (hex) of ids, titles and attributes in order; of equal catalogues it is equal."""
        return self._content_hash

    @functools.cached_property
    def _content_hash(self) -> str:
        digest = hashlib.sha256(str(self.num_items).encode())
        attributes = ((name, *texts) for name, texts in sorted(self.attributes.items()))
        texts = itertools.chain(self.item_ids, self.titles, *attributes)
        for text in map(str.encode, texts):
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()
