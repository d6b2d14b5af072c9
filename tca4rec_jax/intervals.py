"""Means over rows: intervals that resample users, tests of paired differences, Holm's correction.

The rows of one user are not independent, so what is drawn, or exchanged, is a user with all of its
rows. Where every user has one row that is the bootstrap over rows.

A metric is a column float [R] over the rows. Of a masked array (numpy.ma) the rows that are masked
do not count: they are outside a slice, or the metric is not defined for them.

Axis letters: R rows, U users, J metrics, W resamples.
"""

from collections.abc import Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd

RESAMPLES = 2000
DRAWS = 10_000
"""Of a randomisation test: its p-values are multiples of about 1 / DRAWS."""
_AT_ONCE = 128  # bounds the memory of what is drawn

Name = TypeVar("Name", bound=Hashable)


class Interval(NamedTuple):
    """A mean over rows and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


class _Sums(NamedTuple):
    """Of every user and metric, over the rows that count, both float64 [U, J]."""

    sum_UxJ: np.ndarray
    count_UxJ: np.ndarray
    mean_J: np.ndarray  # over all rows

    @classmethod
    def of(cls, values: Mapping[Name, np.ndarray], user_R: np.ndarray) -> "_Sums":
        sizes = {name: np.shape(column) for name, column in values.items()}
        if not values or {*sizes.values()} != {np.shape(user_R)} or not len(user_R):
            raise ValueError(
                f"expected metrics over the same rows, at least one row, got {sizes} of "
                f"{len(user_R)} rows' users"
            )
        columns = [np.ma.asarray(one, np.float64) for one in values.values()]
        counts_RxJ = ~np.stack([np.ma.getmaskarray(one) for one in columns], axis=1)
        value_RxJ = np.stack([one.filled(0.0) for one in columns], axis=1)
        for row, column in np.argwhere(~np.isfinite(value_RxJ)):
            raise ValueError(f"row {row}: {list(values)[column]} is {value_RxJ[row, column]}")
        for column in np.flatnonzero(~counts_RxJ.any(axis=0)):
            raise ValueError(f"{list(values)[column]}: no row counts")
        number_R, users = pd.factorize(user_R)  # in the order of their first rows
        sum_UxJ, count_UxJ = (
            np.stack([np.bincount(number_R, one_R, len(users)) for one_R in array.T], axis=1)
            for array in (value_RxJ, counts_RxJ.astype(np.float64))
        )
        return cls(sum_UxJ, count_UxJ, value_RxJ.sum(axis=0) / counts_RxJ.sum(axis=0))


def bootstrap_intervals(
    values: Mapping[Name, np.ndarray],
    user_R: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[Name, Interval]:
    """Means over rows with percentile bootstrap intervals of coverage `level`.

    All metrics {name: float [R]} share the users that are drawn, as many as there are, with
    replacement, `resamples` times; the same seed and number of users draw the same ones. `user_R`
    are the rows' users, integers. Raises ValueError for no metric, different numbers of rows, a
    value that is not finite, a metric of which no row counts, or arguments out of range.
    """
    sums = _Sums.of(values, user_R)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"need resamples >= 1 and 0 < level < 1, got {resamples} and {level}")
    means = []
    for times_WxU in resampled_users(len(sums.sum_UxJ), resamples, seed):
        with np.errstate(invalid="ignore"):  # NaN where no user of a slice was drawn
            means.append(times_WxU @ sums.sum_UxJ / (times_WxU @ sums.count_UxJ))
    tail = (1 - level) / 2
    low_J, high_J = np.nanquantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    columns = np.stack([sums.mean_J, low_J, high_J], axis=1).tolist()
    return {name: Interval(*column) for name, column in zip(values, columns, strict=True)}


def resampled_users(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """int [W, U], in blocks: how often each user is drawn, `users` of them with replacement."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        # Drawing users with replacement and counting them is one multinomial draw.
        yield rng.multinomial(users, np.full(users, 1 / users), size=size)


def randomisation_test(
    differences: Mapping[Name, np.ndarray],
    user_R: np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[Name, float]:
    """Two-sided p-values of the hypothesis that two models are the same, by name.

    Of paired differences {name: float [R]}. If the models are the same, then so is the chance of a
    user's differences and of their opposites: the signs of whole users are drawn `draws` times, and
    p is the share of draws, the data among them, whose sum is as far from 0 as that of the data
    (Fisher's randomisation test; Smucker et al., CIKM 2007, for rankings). Raises as
    `bootstrap_intervals`.
    """
    sum_UxJ = _Sums.of(differences, user_R).sum_UxJ
    found_J = np.abs(sum_UxJ.sum(axis=0))
    least_J = found_J - 1e-9 * np.abs(sum_UxJ).sum(axis=0)  # sums in another order are as far
    rng, as_far_J = np.random.default_rng(seed), np.ones(len(found_J))
    for start in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - start), len(sum_UxJ)
        sign_WxU = 2.0 * rng.integers(0, 2, size, np.int8) - 1
        as_far_J += np.sum(np.abs(sign_WxU @ sum_UxJ) >= least_J, axis=0)
    return dict(zip(differences, (as_far_J / (draws + 1)).tolist(), strict=True))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Adjusted p-values (Holm, 1979): all below a level hold together at this level."""
    ascending = sorted(p_values, key=p_values.__getitem__)
    left = np.arange(len(ascending), 0, -1)
    stepped = np.maximum.accumulate(left * [p_values[name] for name in ascending])
    adjusted = dict(zip(ascending, np.minimum(stepped, 1.0).tolist(), strict=True))
    return {name: adjusted[name] for name in p_values}
