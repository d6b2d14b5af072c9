"""Interactions (user, item, time) and items from tables."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.odd_titles import odd_titles
from tca4rec_jax.data.sequences import UNKNOWN_TIME
from tca4rec_jax.data.tables import STRICT, Reading, Table, read_rows
from tca4rec_jax.errors import UserError

_PART = 1 << 22  # interactions that are compared at a time


@dataclass(frozen=True, eq=False)
class Interactions:
    """n interactions.

    Attributes:
      user, item: int32 [n], indices into `user_ids` and the catalogue.
      timestamp: int64 [n], at least 0; any unit, only order and equality count. UNKNOWN_TIME in
        all of them: the interactions of a user stand in their order, oldest first.
      rating: float32 [n]; None without ratings.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    user_ids: tuple[str, ...] = ()
    rating: np.ndarray | None = None

    @property
    def has_times(self) -> bool:
        """Whether the times are known."""
        return bool(np.any(self.timestamp != UNKNOWN_TIME))

    def take(self, rows: np.ndarray) -> "Interactions":
        """Some of the interactions, of the same users."""
        rating = None if self.rating is None else self.rating[rows]
        user, item, timestamp = (one[rows] for one in (self.user, self.item, self.timestamp))
        return Interactions(user, item, timestamp, self.user_ids, rating)


def read_items(
    path: Path,
    columns: Mapping[str, str],
    max_title_length: int = 0,
    reading: Reading = STRICT,
) -> Catalogue:
    """The catalogue, in the order of the file; raises as `read_rows` and `catalogue_of` do.

    `columns` beside 'item' and 'title' are attributes.
    """

    def read(table: Table) -> Catalogue:
        ids, titles = table.ids("item"), table.titles("title")
        table.refuse("item", pd.Series(ids).duplicated(), "an id that no earlier row has")
        attributes = table.attributes(columns.keys() - {"item", "title"})
        return catalogue_of(path, ids, titles, max_title_length, attributes)

    return read_rows(path, columns, read, reading)


def catalogue_of(
    path: Path,
    item_ids: np.ndarray,
    titles: Iterable[str],
    max_length: int,
    attributes: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    *,
    keep_spaces: bool = False,
) -> Catalogue:
    """A Catalogue whose errors name the file; titles are cut if `max_length` is not 0.

    A title that is cut after a space loses it, unless spaces are kept.
    What is odd about the titles is logged.
    """
    if max_length < 0:
        raise UserError(f"data.max_title_length is {max_length}: expected at least 0")
    whole = tuple(titles)
    cut = tuple(title[: max_length or None] for title in whole)
    cut = cut if keep_spaces else tuple(map(str.strip, cut))
    try:
        catalogue = Catalogue(tuple(item_ids), cut, dict(attributes))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    for note in odd_titles(whole, cut):
        logging.warning("%s: %s", path, note)
    return catalogue


def read_items_without_titles(
    path: Path, columns: Mapping[str, str], reading: Reading = STRICT
) -> Catalogue:
    """The items of a file of interactions, in the order in which they first occur.

    An item's title is its id. Raises as `read_rows` does.
    """

    def read(table: Table) -> Catalogue:
        ids = tuple(dict.fromkeys(table.ids("item")))
        return Catalogue(ids, ids)

    return read_rows(path, columns, read, reading)


def read_interactions(
    path: Path,
    catalogue: Catalogue,
    columns: Mapping[str, str],
    reading: Reading = STRICT,
) -> Interactions:
    """Interactions in the order of the file; raises as `read_rows` does.

    Those of `interactions_of`, whose items the catalogue has.
    """
    among = f"the catalogue of {catalogue.num_items}"

    def read(table: Table) -> Interactions:
        return interactions_of(table, table.indices("item", catalogue.find, among))

    return read_rows(path, columns, read, reading)


def interactions_of(table: Table, item_n: np.ndarray) -> Interactions:
    """The interactions of a table with a 'user' and perhaps a 'timestamp' and a 'rating'.

    Users are numbered in the order of their ids, without times as the file has them.
    """
    code_n, user_ids = table.codes("user")
    if timed := "timestamp" in table.columns:
        order = pc.sort_indices(pa.array(user_ids)).to_numpy()  # of text: fast
        code_n, user_ids = np.argsort(order).astype(np.int32)[code_n], user_ids[order]
    times = table.times("timestamp") if timed else np.full(len(item_n), UNKNOWN_TIME)
    rating = table.numbers("rating") if "rating" in table.columns else None
    return Interactions(code_n, item_n, times, tuple(user_ids), rating)


def treat_duplicates(interactions: Interactions, drop: bool) -> Interactions:
    """Drops, or only counts, those of a user, an item and a time that stand earlier; logs them.

    Without times none is known to be one.
    """
    if not interactions.has_times:
        return interactions
    repeated = _repeated(interactions.user, interactions.item, interactions.timestamp)
    if count := int(repeated.sum()):
        done = "dropped" if drop else "kept (data.drop_duplicates=true drops them)"
        logging.warning(
            "%d of %d interactions are exact duplicates: %s", count, len(repeated), done
        )
    return interactions.take(~repeated) if drop and count else interactions


def _repeated(*columns: np.ndarray) -> np.ndarray:
    """bool [n], the rows that equal an earlier one. Those whose hash occurs twice are compared."""
    count = len(columns[0])
    parts = [slice(start, start + _PART) for start in range(0, count, _PART)]
    sorted_n = np.empty(count, np.uint64)
    for part in parts:
        sorted_n[part] = _hash(columns, part)
    sorted_n.sort()
    twice = np.unique(sorted_n[1:][sorted_n[1:] == sorted_n[:-1]])
    del sorted_n
    repeated_n = np.zeros(count, bool)
    if twice.size:
        found = (
            part.start + np.flatnonzero(np.isin(_hash(columns, part), twice)) for part in parts
        )
        row = np.concatenate([*found])
        repeated_n[row] = pd.DataFrame({n: of[row] for n, of in enumerate(columns)}).duplicated()
    return repeated_n


def _hash(columns: Iterable[np.ndarray], part: slice) -> np.ndarray:
    """uint64 [n], of every row in a part of the columns."""
    hash_n = np.zeros((), np.uint64)
    for column in columns:
        hash_n = (hash_n ^ column[part].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hash_n ^= hash_n >> np.uint64(32)
    return hash_n
