"""Interactions (user, item, time) from files, and the chronological splits made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from absl import logging

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.odd_titles import odd_titles
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.tables import STRICT, Reading, Table, read_rows
from tca4rec_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Interactions:
    """n interactions.

    Attributes:
      user, item: int32 [n], indices into the sorted `user_ids` and the catalogue.
      timestamp: int64 [n], at least 0; any unit, only order and equality count.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    user_ids: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> "Interactions":
        """Some of the interactions, of the same users."""
        return Interactions(self.user[rows], self.item[rows], self.timestamp[rows], self.user_ids)


def read_items(
    path: Path,
    columns: Mapping[str, str],
    max_title_length: int = 0,
    reading: Reading = STRICT,
) -> Catalogue:
    """The catalogue, in the order of the file; raises as `read_rows` and `catalogue_of` do."""

    def read(table: Table) -> Catalogue:
        ids, titles = table.ids("item"), table.titles("title")
        table.refuse("item", pd.Series(ids).duplicated(), "an id that no earlier row has")
        return catalogue_of(path, ids, titles, max_title_length)

    return read_rows(path, columns, read, reading)


def catalogue_of(
    path: Path, item_ids: np.ndarray, titles: Iterable[str], max_length: int
) -> Catalogue:
    """A Catalogue whose errors name the file; titles are cut if `max_length` is not 0.

    What is odd about the titles is logged.
    """
    if max_length < 0:
        raise UserError(f"data.max_title_length is {max_length}: expected at least 0")
    whole = tuple(titles)
    cut = tuple(title[: max_length or None].strip() for title in whole)
    try:
        catalogue = Catalogue(tuple(item_ids), cut)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    for note in odd_titles(whole, cut):
        logging.warning("%s: %s", path, note)
    return catalogue


def read_interactions(
    path: Path,
    catalogue: Catalogue,
    columns: Mapping[str, str],
    reading: Reading = STRICT,
) -> Interactions:
    """Interactions in the order of the file; raises as `read_rows` does."""

    def read(table: Table) -> Interactions:
        user, user_ids = pd.factorize(pd.Series(table.ids("user"), dtype=object), sort=True)
        item = table.indices("item", catalogue.find, f"the catalogue of {catalogue.num_items}")
        return Interactions(user.astype(np.int32), item, table.times("timestamp"), tuple(user_ids))

    return read_rows(path, columns, read, reading)


def treat_duplicates(interactions: Interactions, drop: bool) -> Interactions:
    """Drops, or only counts, those of a user, an item and a time that stand earlier; logs them."""
    columns = (interactions.user, interactions.item, interactions.timestamp)
    repeated = pd.DataFrame(dict(enumerate(columns))).duplicated().to_numpy()
    if count := int(repeated.sum()):
        done = "dropped" if drop else "kept (data.drop_duplicates=true drops them)"
        logging.warning(
            "%d of %d interactions are exact duplicates: %s", count, len(repeated), done
        )
    return interactions.take(~repeated) if drop and count else interactions


def order_by_time(interactions: Interactions, seed: int) -> Interactions:
    """Sorted by time, interactions of equal time in an order drawn from `seed`.

    Users rate in bursts that share a timestamp; if these were ordered by item id, that would tell
    the next item. The order in which the file held them has no effect.
    """
    given = interactions
    canonical = given.take(np.lexsort((given.item, given.user, given.timestamp)))
    shuffled = canonical.take(np.random.default_rng(seed).permutation(len(given.user)))
    return shuffled.take(np.argsort(shuffled.timestamp, kind="stable"))


def build_splits(
    interactions: Interactions,
    *,
    history_length: int = 10,
    min_history: int | None = None,
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, ItemSequences]:
    """The four splits, chronological over all users together.

    A row is an interaction (the target) with the up to `history_length` interactions of its user
    before it; interactions with fewer than `min_history` (default: history_length) before them
    give no row. The rows are ordered by the time of their target and cut in three by `split`.
    train_sequences holds, for every user with two or more of them, all interactions before the
    first validation target (those of users without any row included).

    `DataConfig` says the ranges of the settings. Raises UserError if they leave a split without
    rows.
    """
    min_history = history_length if min_history is None else min_history
    ordered = order_by_time(interactions, seed)
    place = np.argsort(ordered.user, kind="stable")  # in time, of every interaction in by_user
    by_user = ordered.take(place)
    new_user = np.flatnonzero(np.diff(by_user.user, prepend=-1))
    before = np.arange(len(place)) - np.repeat(new_user, np.diff(new_user, append=len(place)))
    targets = np.flatnonzero(before >= min_history)
    targets = targets[np.argsort(place[targets])]
    first, second = _boundaries(len(targets), split, min_history)

    def rows(starts_R, lengths_R):
        positions = Ragged.from_lengths(ranges(starts_R, lengths_R), lengths_R)
        found = by_user.take(positions.values)
        user_R = by_user.user[starts_R]
        return ItemSequences(user_R, found.item, positions.offsets, found.timestamp)

    def rows_of(targets_R):
        lengths_R = np.minimum(before[targets_R], history_length) + 1
        return rows(targets_R + 1 - lengths_R, lengths_R)

    training = place < place[targets[first]]  # strictly before the first validation target
    counts = np.add.reduceat(training.astype(np.int64), new_user)
    kept = counts >= 2  # a user's training interactions come first in his block of by_user
    return {
        "train_sequences": rows(new_user[kept], counts[kept]),
        "train": rows_of(targets[:first]),
        "validation": rows_of(targets[first:second]),
        "test": rows_of(targets[second:]),
    }


def _boundaries(num_rows: int, split: tuple[float, ...], min_history: int) -> tuple[int, int]:
    """Where validation and test begin among the rows in time order."""
    first, second = round(num_rows * split[0]), round(num_rows * (split[0] + split[1]))
    if not 0 < first < second < num_rows:
        raise UserError(
            f"{num_rows} interactions have {min_history} or more of their user before them, too "
            f"few to fill train, validation and test by {tuple(split)}; use more data or a smaller "
            "min_history (or history_length)"
        )
    return first, second
