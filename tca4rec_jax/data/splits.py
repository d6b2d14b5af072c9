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
        raise UserError(
            "data without times have no order over all users: set data.split_by=leave_one_out, or "
            "ratio"
        )
    place_n = histories.place
    start_U = np.flatnonzero(np.diff(histories.user, prepend=-1)).astype(place_n.dtype)
    count_U = np.diff(start_U, append=place_n.dtype.type(len(place_n)))
    before_n = np.arange(len(place_n), dtype=place_n.dtype)
    before_n -= np.repeat(start_U, count_U)
    if by_time:
        how = config.split, config.round_split
        cut = _cut_by_time(place_n, before_n, start_U, least, *how)
    elif config.split_by == "ratio":
        cut = _cut_by_ratio(before_n, count_U, least, config.split)
    else:
        cut = _leave_one_out(before_n, start_U, count_U, least)

    kept_U = cut.training_U >= 2
    bounds = [(start_U[kept_U], cut.training_U[kept_U])]
    for targets_R in cut[:3]:
        length_R = np.minimum(before_n[targets_R], config.history_length) + 1
        bounds.append((targets_R + 1 - length_R, length_R))
    rows = (Windows(histories, *bound, config.liked_above) for bound in bounds)
    return dict(zip(SPLITS, rows, strict=True))


def _cut_by_time(
    place_n: np.ndarray,
    before_n: np.ndarray,
    start_U: np.ndarray,
    min_history: int,
    split: tuple[float, float, float],
    round_split: str,
) -> _Cut:
    number_n = np.empty_like(before_n)  # of the interactions in the order of their places
    number_n[place_n] = np.arange(len(place_n), dtype=place_n.dtype)
    targets_R = number_n[before_n[number_n] >= min_history]
    count = len(targets_R)
    first, second = round(count * split[0]), round(count * (split[0] + split[1]))
    if round_split == "down":
        first = int(count * split[0])
        second = first + int(count * split[1])
    if not 0 < first < second < count:
        raise UserError(
            f"{count} interactions have {min_history} or more of their user before them, too "
            f"few to fill train, validation and test by {tuple(split)}; use more data or a smaller "
            "min_history (or history_length)"
        )
    training_n = place_n < place_n[targets_R[first]]  # strictly before the first validation target
    training_U = np.add.reduceat(training_n, start_U, dtype=place_n.dtype)
    return _Cut(targets_R[:first], targets_R[first:second], targets_R[second:], training_U)


def _leave_one_out(
    before_n: np.ndarray, start_U: np.ndarray, count_U: np.ndarray, min_history: int
) -> _Cut:
    long_U = count_U >= min_history + 2
    if short := int((~long_U).sum()):
        logging.warning(
            "%d of %d users have fewer than %d interactions (min_history before one for validation "
            "and one for test): they are only trained on",
            *(short, len(long_U), min_history + 2),
        )
    training_U = count_U - 2 * long_U
    training_n = before_n < np.repeat(training_U, count_U)
    train_R = np.flatnonzero(training_n & (before_n >= min_history))
    if not (train_R.size and long_U.any()):
        raise UserError(
            f"the most interactions of a user are {count_U.max()}, too few to leave one out for "
            f"validation, one for test, and train on one with {min_history} before it; use more "
            "data or a smaller min_history"
        )
    last_R = (start_U + count_U)[long_U] - 1
    return _Cut(train_R, last_R - 1, last_R, training_U)


def _cut_by_ratio(
    before_n: np.ndarray, count_U: np.ndarray, min_history: int, split: tuple[float, float, float]
) -> _Cut:
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
    if not (train_R.size and validation_R.size and test_R.size):
        raise UserError(
            f"the most interactions of a user are {count_U.max()}, too few to cut each user's by "
            f"{tuple(split)} with {min_history} before a target; use more data or a smaller "
            "min_history"
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
