"""Which interactions are kept: by rating and time, of frequent items, a core, drawn users.

Each filter is a pure function; `Report` counts what each of them left.
"""

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

    def keep(step: str, kept: Interactions) -> None:
        nonlocal interactions
        interactions = kept
        report.add(f"data.filters.{step}", kept)

    if filters.min_rating is not None:
        if interactions.rating is None:
            raise UserError("data.filters.min_rating needs data.rating_column")
        at_least = interactions.rating >= np.float32(filters.min_rating)
        keep(f"min_rating={filters.min_rating:g}", interactions.take(at_least))
    for name in ("since", "before"):
        if date := getattr(filters, name):
            earlier = interactions.timestamp < _tick(interactions, date)
            keep(f"{name}={date}", interactions.take(earlier if name == "before" else ~earlier))
    if filters.last_days:
        first = interactions.timestamp.max() - filters.last_days * _DAY * _ticks(interactions)
        keep(f"last_days={filters.last_days}", interactions.take(interactions.timestamp > first))
    if filters.max_items:
        frequent = most_frequent(interactions.item, filters.max_items)
        keep(f"max_items={filters.max_items}", interactions.take(frequent))
    if filters.user_core or filters.item_core:
        step = f"user_core={filters.user_core}, item_core={filters.item_core}"
        keep(step, core(interactions, filters.user_core, filters.item_core))
    if filters.max_users:
        drawn = drawn_users(interactions.user, filters.max_users, filters.seed)
        keep(f"max_users={filters.max_users}", interactions.take(drawn))
    return interactions


def core(interactions: Interactions, user_core: int, item_core: int) -> Interactions:
    """The most interactions of which every user has `user_core` and every item `item_core`."""
    while True:
        user_n, item_n = interactions.user, interactions.item
        kept_n = np.bincount(user_n)[user_n] >= user_core
        kept_n &= np.bincount(item_n)[item_n] >= item_core
        if kept_n.all():
            return interactions
        interactions = interactions.take(kept_n)


def most_frequent(item_n: np.ndarray, most: int) -> np.ndarray:
    """bool [n], those of the `most` most frequent items; of equal ones the first numbers."""
    order = np.argsort(-np.bincount(item_n), kind="stable")
    return np.isin(item_n, order[:most])


def drawn_users(user_n: np.ndarray, most: int, seed: int) -> np.ndarray:
    """bool [n], those of `most` users (int [n]), drawn from `seed`."""
    users = _used(user_n)
    return np.isin(user_n, np.random.default_rng(seed).permutation(users)[:most])


def only_used(catalogue: Catalogue, interactions: Interactions) -> tuple[Catalogue, Interactions]:
    """Without items and users that have no interaction; the others keep their order."""
    users, items = _used(interactions.user), _used(interactions.item)
    user_ids = tuple(interactions.user_ids[user] for user in users)
    numbers = {
        name: np.cumsum(np.bincount(used), dtype=np.int32)[getattr(interactions, name)]
        - np.int32(1)
        for name, used in (("user", users), ("item", items))
    }
    return catalogue.take(items), replace(interactions, user_ids=user_ids, **numbers)


def _used(number_n: np.ndarray) -> np.ndarray:
    """Int, the numbers that occur, ascending."""
    return np.flatnonzero(np.bincount(number_n))


def _ticks(interactions: Interactions) -> int:
    if not interactions.has_times:
        raise UserError("data.filters.since, before and last_days need times")
    return ticks_per_second(interactions.timestamp)


def _tick(interactions: Interactions, date: str) -> int:
    """A date in the unit of the interactions' times."""
    time = datetime.fromisoformat(date)
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return round(time.timestamp()) * _ticks(interactions)
