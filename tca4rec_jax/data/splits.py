"""The splits that are made of interactions: by time over all users, or of each user.

Axis letters: n interactions, sorted by user, then time; U users who have some; R rows. Numbers of
interactions have the type of Histories.place, so that many of them fit.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from absl import logging

from tca4rec_jax.data.sequences import SPLITS, UNKNOWN_TIME
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.windows import Histories, RowSource, Windows
from tca4rec_jax.errors import UserError

WITHOUT_TIMES = (
    "data without times have no order over all users: set data.split_by=leave_one_out, or ratio"
)


class _Cut(NamedTuple):
    """Which interactions are the targets of the splits, in the order of their rows, and how many of
    each user, the oldest ones, are for training: int."""

    train_R: np.ndarray
    validation_R: np.ndarray
    test_R: np.ndarray
    training_U: np.ndarray


def build_splits(histories: Histories, config: DataConfig) -> dict[str, Windows]:
    """The four splits, by the fields of `config` about making rows.

    A row is an interaction (the target) with the up to history_length interactions of its user
    before it; interactions with fewer than `least_history` before them give no row. train_sequences
    holds the training interactions of every user with two or more of them.

    split_by 'time' is chronological over all users together: the rows are ordered by the time of
    their target and cut in three by split, whose counts round_split rounds; what is before the
    first validation target is for training (of users without any row, too).

    split_by 'leave_one_out' cuts every user's interactions: the last is the target of test, the
    last but one that of validation, the rest is for training. Rows are ordered by user, then time.
    Users too short for a validation row are only trained on, which is logged.

    split_by 'ratio' cuts every user's interactions in three by split, as RecBole does (Zhao et
    al. 2021): what test and validation have is rounded down, but each has one of a user who has
    three or more. Rows are ordered as with 'leave_one_out'.

    With ratings an item of a row is liked if its rating is above liked_above.

    Raises UserError if a split is left without rows, or for split_by 'time' without times.
    """
    by_time, least = config.split_by == "time", config.least_history
    if by_time and not np.any(histories.timestamp != UNKNOWN_TIME):
        raise UserError(WITHOUT_TIMES)
    users, place_n = Users.of(histories), histories.place
    if by_time:
        number_n = np.empty_like(users.before_n)  # of the interactions in the order of their places
        number_n[place_n] = np.arange(len(place_n), dtype=place_n.dtype)
        targets_R = number_n[users.before_n[number_n] >= least]
        del number_n
        cuts = cut_rows(len(targets_R), config)
        cut = _cut_by_time(place_n, targets_R, users, place_n[targets_R[[*cuts]]])
    else:
        cut = _cut_users(users, config)
        check_cut(np.array([cut_counts(users, cut)]), config)
    return _windows(histories, users, cut, config)


def splits_of_some(
    histories: Histories, config: DataConfig, cuts: tuple[int, int] | None
) -> tuple[dict[str, Windows], list[int]]:
    """The rows that `build_splits` makes of some of the users, and `cut_counts` of them.

    `cuts` are, by 'time', the places of the first target of validation and of test.
    """
    users = Users.of(histories)
    if cuts is None:
        cut = _cut_users(users, config)
    else:
        targets_R = targets_of(users, config.least_history)
        targets_R = targets_R[np.argsort(histories.place[targets_R])]
        cut = _cut_by_time(histories.place, targets_R, users, np.array(cuts))
    return _windows(histories, users, cut, config), cut_counts(users, cut)


class Users(NamedTuple):
    """Where every user's interactions start and how many they are, int [U]; how many of its user
    are before each, int [n]."""

    start_U: np.ndarray
    count_U: np.ndarray
    before_n: np.ndarray

    @classmethod
    def of(cls, histories: Histories) -> "Users":
        """Those of the histories."""
        place_type, count = histories.place.dtype, len(histories.place)
        start_U = np.flatnonzero(np.diff(histories.user, prepend=-1)).astype(place_type)
        count_U = np.diff(start_U, append=place_type.type(count))
        before_n = np.arange(count, dtype=place_type)
        before_n -= np.repeat(start_U, count_U)
        return cls(start_U, count_U, before_n)


def targets_of(users: Users, min_history: int) -> np.ndarray:
    """Int [R], the interactions with so many or more of their user before them."""
    return np.flatnonzero(users.before_n >= min_history)


def cut_rows(count: int, config: DataConfig) -> tuple[int, int]:
    """The first row of validation and that of test among all rows in the order of time.

    Raises UserError if a split has none.
    """
    split = config.split
    first, second = round(count * split[0]), round(count * (split[0] + split[1]))
    if config.round_split == "down":
        first = int(count * split[0])
        second = first + int(count * split[1])
    if not 0 < first < second < count:
        raise UserError(
            f"{count} interactions have {config.least_history} or more of their user before them, "
            f"too few to fill train, validation and test by {tuple(split)}; use more data or a "
            "smaller min_history (or history_length)"
        )
    return first, second


def cut_counts(users: Users, cut: _Cut) -> list[int]:
    """How many users there are, the most interactions of one, how many have none that is held back,
    and the rows of train, validation and test: what `check_cut` is about."""
    whole = int(np.count_nonzero(cut.training_U == users.count_U))
    most = int(users.count_U.max(initial=0))
    return [len(users.count_U), most, whole, *map(len, cut[:3])]


def check_cut(counts_Px6: np.ndarray, config: DataConfig) -> None:
    """Logs how many users 'leave_one_out' only trains on, and raises UserError if a split has no
    rows, of 'leave_one_out' or 'ratio'; of the `cut_counts` of P parts of the users."""
    least, most = config.least_history, counts_Px6[:, 1].max()
    users, _, whole, *rows = counts_Px6.sum(axis=0)
    of_users = config.split_by == "leave_one_out"
    if of_users and whole:
        logging.warning(
            "%d of %d users have fewer than %d interactions (min_history before one for validation "
            "and one for test): they are only trained on",
            *(whole, users, least + 2),
        )
    if not all(rows):
        what = f"cut each user's by {tuple(config.split)} with {least} before a target"
        if of_users:
            what = (
                "leave one out for validation, one for test, and train on one with "
                f"{least} before it"
            )
        raise UserError(
            f"the most interactions of a user are {most}, too few to {what}; use more data or a "
            "smaller min_history"
        )


def _windows(
    histories: Histories, users: Users, cut: _Cut, config: DataConfig
) -> dict[str, Windows]:
    kept_U = cut.training_U >= 2
    bounds = [(users.start_U[kept_U], cut.training_U[kept_U])]
    for targets_R in cut[:3]:
        length_R = np.minimum(users.before_n[targets_R], config.history_length) + 1
        bounds.append((targets_R + 1 - length_R, length_R))
    rows = (Windows(histories, *bound, config.liked_above) for bound in bounds)
    return dict(zip(SPLITS, rows, strict=True))


def _cut_by_time(
    place_n: np.ndarray, targets_R: np.ndarray, users: Users, cuts: np.ndarray
) -> _Cut:
    """Of targets in the order of their places; `cuts` are the places of the first target of
    validation and of test."""
    training_n = place_n < cuts[0]  # strictly before the first validation target
    training_U = np.add.reduceat(training_n, users.start_U, dtype=place_n.dtype)
    first, second = np.searchsorted(place_n[targets_R], cuts)
    return _Cut(targets_R[:first], targets_R[first:second], targets_R[second:], training_U)


def _cut_users(users: Users, config: DataConfig) -> _Cut:
    """Of every user's interactions by themselves."""
    if config.split_by == "ratio":
        return _cut_by_ratio(users, config.least_history, config.split)
    return _leave_one_out(users, config.least_history)


def _leave_one_out(users: Users, min_history: int) -> _Cut:
    start_U, count_U, before_n = users
    long_U = count_U >= min_history + 2
    training_U = count_U - 2 * long_U
    training_n = before_n < np.repeat(training_U, count_U)
    train_R = np.flatnonzero(training_n & (before_n >= min_history))
    last_R = (start_U + count_U)[long_U] - 1
    return _Cut(train_R, last_R - 1, last_R, training_U)


def _cut_by_ratio(users: Users, min_history: int, split: tuple[float, float, float]) -> _Cut:
    count_U, before_n = users.count_U, users.before_n
    validation_U, test_U = ((count_U * share).astype(np.int64) for share in split[1:])
    training_U = count_U - validation_U - test_U
    for of_U, share in ((test_U, split[2]), (validation_U, split[1])):
        one_more_U = (training_U > 1) & (count_U * share < 1)
        of_U += one_more_U
        training_U -= one_more_U
    ends = training_U, training_U + validation_U
    part_n = sum(before_n >= np.repeat(end_U, count_U) for end_U in ends)
    train_R, validation_R, test_R = (
        np.flatnonzero((part_n == part) & (before_n >= min_history)) for part in range(3)
    )
    return _Cut(train_R, validation_R, test_R, training_U)


def hold_out(
    splits: Mapping[str, RowSource], items: float, users: float, seed: int, min_history: int
) -> dict[str, RowSource]:
    """The splits without some items and users in train_sequences and train: so that test has cold
    ones, as in TIGER (Rajput et al. 2023, section 4.3).

    Those are drawn from `seed`: a share of the items that are targets in test, and of the users
    there. A history loses its cold items; a row goes if its target or its user is cold, or if fewer
    than `min_history` items are left before its target.
    """
    test, generator = splits["test"].copied(), np.random.default_rng(seed)
    targets = np.unique(test.items[test.last_positions])
    cold_items = generator.permutation(targets)[: round(items * targets.size)]
    owners = np.unique(test.user)
    cold_users = generator.permutation(owners)[: round(users * owners.size)]
    logging.info(
        "Of test %d items and %d users are kept out of training", cold_items.size, cold_users.size
    )
    found: dict[str, RowSource] = dict(splits)
    for name, least in (("train_sequences", 2), ("train", min_history + 1)):
        rows = splits[name].copied()
        kept_n = ~np.isin(rows.items, cold_items)
        row_n = np.repeat(np.arange(len(rows)), rows.lengths)
        kept_R = ~np.isin(rows.user, cold_users) & (
            np.bincount(row_n[kept_n], minlength=len(rows)) >= least
        )
        if name == "train":
            kept_R &= kept_n[rows.last_positions]
        found[name] = rows.of_items(kept_n & kept_R[row_n])
    return found


def sampled(
    splits: Mapping[str, RowSource], samples: tuple[int, int, int], seed: int
) -> dict[str, RowSource]:
    """So many rows of train, validation and test, in the order in which pandas draws them from the
    seed, as the published code does; all rows, in their order, of 0 or more than there are."""
    found = dict(splits)
    for name, count in zip(SPLITS[1:], samples, strict=True):
        if 0 < count < len(rows := splits[name]):
            drawn = pd.Series(np.arange(len(rows))).sample(count, random_state=seed)
            found[name] = rows.take(drawn.to_numpy())
    return found
