"""Which interactions are kept: by rating and time, of frequent items, a core, drawn users.

Each filter is a pure function; `Report` counts what each of them left.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
from absl import logging

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.tables import ticks_per_second
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Date, Natural, NotNegative, Seed, check_fields

_DAY = 24 * 60 * 60
_PART = 1 << 20  # interactions that are counted or looked up at a time


@dataclass(frozen=True)
class Filters:
    """Which interactions are kept, in this order; by default all of them.

    If one of these is set, items of which no interaction is left are not in the catalogue.

    Attributes:
      min_rating: those of this rating or a higher one (data.rating_column).
      since: those of this date (UTC, or with a zone) or later.
      before: those earlier than this date.
      last_days: those less than so many days before the last of them; 0: of any time.
      max_items: those with so many items, the most frequent ones; 0: with any.
      user_core: those of users who have so many, again and again with item_core until all have; 0:
        of any.
      item_core: those with items that have so many.
      max_users: those of so many users, drawn from `seed`; 0: of any.
      seed: of the users that are drawn.
    """

    min_rating: NotNegative | None = None
    since: Date | None = None
    before: Date | None = None
    last_days: Natural = 0
    max_items: Natural = 0
    user_core: Natural = 0
    item_core: Natural = 0
    max_users: Natural = 0
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self, "data.filters.")

    @property
    def by_time(self) -> bool:
        """Whether any of them is about time."""
        return bool(self.since or self.before or self.last_days)

    @property
    def on(self) -> bool:
        """Whether any of them is set."""
        return replace(self, seed=0) != Filters()


class Step(NamedTuple):
    """What a step of the preparation left."""

    step: str
    users: int
    items: int
    interactions: int


class Report:
    """What each step of the preparation left, logged as it comes."""

    def __init__(self):
        self.steps: list[Step] = []

    def add(self, step: str, interactions: Interactions) -> None:
        """Raises UserError if no interaction is left."""
        if not len(interactions.user):
            raise UserError(f"no interaction is left after {step}: ask for less")
        users, items = (len(_used(of)) for of in (interactions.user, interactions.item))
        self.steps.append(Step(step, users, items, len(interactions.user)))
        logging.info(
            "%s: %s users, %s items, %s interactions",
            *(step, *(f"{count:,}" for count in self.steps[-1][1:])),
        )


def filtered(interactions: Interactions, filters: Filters, report: Report) -> Interactions:
    """What the filters keep, in its order; users and items keep their numbers.

    Raises UserError if nothing is left, and for filters by what the interactions do not have.
    """

    def keep(step: str, kept_n: np.ndarray) -> None:
        nonlocal interactions
        if not kept_n.all():
            interactions = interactions.take(kept_n)
        report.add(f"data.filters.{step}", interactions)

    if filters.min_rating is not None:
        if interactions.rating is None:
            raise UserError("data.filters.min_rating needs data.rating_column")
        at_least = interactions.rating >= np.float32(filters.min_rating)
        keep(f"min_rating={filters.min_rating:g}", at_least)
    for name in ("since", "before"):
        if date := getattr(filters, name):
            earlier = interactions.timestamp < _tick(interactions, date)
            keep(f"{name}={date}", earlier if name == "before" else ~earlier)
    if filters.last_days:
        first = interactions.timestamp.max() - filters.last_days * _DAY * _ticks(interactions)
        keep(f"last_days={filters.last_days}", interactions.timestamp > first)
    if filters.max_items:
        frequent = most_frequent(interactions.item, filters.max_items)
        keep(f"max_items={filters.max_items}", frequent)
    if filters.user_core or filters.item_core:
        step = f"user_core={filters.user_core}, item_core={filters.item_core}"
        numbers = interactions.user, interactions.item
        keep(step, core(*numbers, filters.user_core, filters.item_core))
    if filters.max_users:
        drawn = drawn_users(interactions.user, filters.max_users, filters.seed)
        keep(f"max_users={filters.max_users}", drawn)
    return interactions


def core(user_n: np.ndarray, item_n: np.ndarray, user_core: int, item_core: int) -> np.ndarray:
    """bool [n], the most of which every user has `user_core` and every item `item_core`."""
    kept_n = np.ones(len(user_n), bool)
    while True:
        left = np.count_nonzero(kept_n)
        enough_users = _counts(user_n, kept_n) >= user_core
        enough_items = _counts(item_n, kept_n) >= item_core
        kept_n &= _looked_up(enough_users, user_n)
        kept_n &= _looked_up(enough_items, item_n)
        if np.count_nonzero(kept_n) == left:
            return kept_n


def most_frequent(item_n: np.ndarray, most: int) -> np.ndarray:
    """bool [n], those of the `most` most frequent items; of equal ones the first numbers."""
    counts = _counts(item_n)
    return _those_of(np.argsort(-counts, kind="stable")[:most], item_n)


def drawn_users(user_n: np.ndarray, most: int, seed: int) -> np.ndarray:
    """bool [n], those of `most` users (int [n]), drawn from `seed`."""
    return _those_of(np.random.default_rng(seed).permutation(_used(user_n))[:most], user_n)


def only_used(catalogue: Catalogue, interactions: Interactions) -> tuple[Catalogue, Interactions]:
    """Without items and users that have no interaction; the others keep their order."""
    users, items = _used(interactions.user), _used(interactions.item)
    user_ids = tuple(interactions.user_ids[user] for user in users)
    numbers = {}
    for name, used in (("user", users), ("item", items)):
        new_k = np.cumsum(np.bincount(used), dtype=np.int32) - np.int32(1)
        numbers[name] = _looked_up(new_k, getattr(interactions, name))
    return catalogue.take(items), replace(interactions, user_ids=user_ids, **numbers)


def _used(number_n: np.ndarray) -> np.ndarray:
    """Int, the numbers that occur, ascending."""
    return np.flatnonzero(_counts(number_n))


def _those_of(numbers: np.ndarray, number_n: np.ndarray) -> np.ndarray:
    """bool [n], where the number is one of these."""
    wanted_k = np.zeros(int(number_n.max(initial=-1)) + 1, bool)
    wanted_k[numbers] = True
    return _looked_up(wanted_k, number_n)


# NumPy copies the indices of a lookup, and what it counts, to int64: here some at a time.


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _PART) for start in range(0, count, _PART))


def _counts(number_n: np.ndarray, kept_n: np.ndarray | None = None) -> np.ndarray:
    """Int, how often every number from 0 occurs, perhaps only where kept (bool [n])."""
    counts = np.zeros(int(number_n.max(initial=-1)) + 1, np.int64)
    for part in _parts(len(number_n)):
        counted = number_n[part] if kept_n is None else number_n[part][kept_n[part]]
        counts += np.bincount(counted, minlength=len(counts))
    return counts


def _looked_up(values: np.ndarray, number_n: np.ndarray) -> np.ndarray:
    """values[number_n]."""
    found_n = np.empty(len(number_n), values.dtype)
    for part in _parts(len(number_n)):
        found_n[part] = values[number_n[part]]
    return found_n


def _ticks(interactions: Interactions) -> int:
    if not interactions.has_times:
        raise UserError("data.filters.since, before and last_days need times")
    return ticks_per_second(interactions.timestamp)


def _tick(interactions: Interactions, date: str) -> int:
    """A date in the unit of the interactions' times."""
    time = datetime.fromisoformat(date)
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return round(time.timestamp()) * _ticks(interactions)
