"""Means over rows: intervals that resample users, tests of paired differences, Holm's correction.

The rows of one user are not independent, so what is drawn, or exchanged, is a user with all of its
rows. Where every user has one row that is the bootstrap over rows. Of models that were trained with
several seeds the seeds are drawn, too (`seed_spread`).

A metric is a column float [R] over the rows. Of a masked array (numpy.ma) the rows that are masked
do not count: they are outside a slice, or the metric is not defined for them.

Axis letters: R rows, U users, J metrics, W resamples, S seeds of training.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
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


class Spread(NamedTuple):
    """How far a mean over seeds of training lies from that over all seeds; none by default.

    Attributes:
      variance: of the mean, as the seeds differ.
      by_users: the part of it that resampled users bring with them.
      freedom: degrees of freedom of the variance.
    """

    variance: float = 0.0
    by_users: float = 0.0
    freedom: int = 1


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
    spread: Mapping[Name, Spread] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[Name, Interval]:
    """Means over rows with percentile bootstrap intervals of coverage `level`.

    All metrics {name: float [R]} share the users that are drawn, as many as there are, with
    replacement, `resamples` times; the same seed and number of users draw the same ones. `user_R`
    are the rows' users, integers. What their `spread` says is drawn, too. Raises ValueError for no
    metric, different numbers of rows, a value that is not finite, a metric of which no row counts,
    or arguments out of range.
    """
    sums = _Sums.of(values, user_R)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"need resamples >= 1 and 0 < level < 1, got {resamples} and {level}")
    means = []
    for times_WxU in resampled_users(len(sums.sum_UxJ), resamples, seed):
        with np.errstate(invalid="ignore"):  # NaN where no user of a slice was drawn
            means.append(times_WxU @ sums.sum_UxJ / (times_WxU @ sums.count_UxJ))
    tail, drawn_WxJ = (1 - level) / 2, np.concatenate(means)
    if spread:
        drawn_WxJ += _noise([spread[name] for name in values], resamples, seed)
    low_J, high_J = np.nanquantile(drawn_WxJ, [tail, 1 - tail], axis=0)
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
    spread: Mapping[Name, Spread] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[Name, float]:
    """Two-sided p-values of the hypothesis that two models are the same, by name.

    Of paired differences {name: float [R]}. If the models are the same, then so is the chance of a
    user's differences and of their opposites: the signs of whole users are drawn `draws` times, and
    p is the share of draws, the data among them, whose sum is as far from 0 as that of the data
    (Fisher's randomisation test; Smucker et al., CIKM 2007, for rankings). What their `spread` says
    is added to every draw. Raises as `bootstrap_intervals`.
    """
    sum_UxJ, count_UxJ, _ = _Sums.of(differences, user_R)
    noise_WxJ = np.zeros((draws, 1))
    if spread:
        spread_J = [spread[name] for name in differences]
        noise_WxJ = _noise(spread_J, draws, seed, count_UxJ.sum(axis=0))
    found_J = np.abs(sum_UxJ.sum(axis=0))
    least_J = found_J - 1e-9 * np.abs(sum_UxJ).sum(axis=0)  # sums in another order are as far
    rng, as_far_J = np.random.default_rng(seed), np.ones(len(found_J))
    for start in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - start), len(sum_UxJ)
        sign_WxU = 2.0 * rng.integers(0, 2, size, np.int8) - 1
        drawn_WxJ = sign_WxU @ sum_UxJ + noise_WxJ[start : start + size[0]]
        as_far_J += np.sum(np.abs(drawn_WxJ) >= least_J, axis=0)
    return dict(zip(differences, (as_far_J / (draws + 1)).tolist(), strict=True))


def seed_spread(values: Mapping[Name, np.ndarray], user_R: np.ndarray) -> dict[Name, Spread]:
    """How far means over seeds and rows lie from those over all seeds.

    Of differences {name: float [S, R]} on the same rows, between models that were trained with S
    seeds and a baseline that they share; how much seeds do is assumed the same for all names, and
    pooled. Models that seeds move as much as their baseline have differences of correlation 1/2,
    variances of correlation 1/4, by which the degrees of freedom are fewer.

    Three seeds drawn from three have two thirds of their variance, and intervals of such draws
    leave the truth out far too often. So users, who are many, are resampled, and the seeds' part is
    drawn: its variance is a draw of that of the seeds' means given how they differ (inverse chi
    squared), less what resampled users bring with them, since users differ in which seed's model
    they like (a generalised pivot: Weerahandi, JASA 1993; seeds and users are crossed as readers
    and cases in Dorfman, Berbaum and Metz, 1992). One seed has no spread: it says nothing of
    others.
    """
    several = {name: one_SxR for name, one_SxR in values.items() if len(one_SxR) > 1}
    if not several:
        return dict.fromkeys(values, Spread())
    freedom_J = np.array([len(one_SxR) - 1 for one_SxR in several.values()])
    variances_Jx2 = np.array([_seed_variances(one, user_R) for one in several.values()])
    variance, by_users = freedom_J @ variances_Jx2 / freedom_J.sum()
    freedom = int(freedom_J.sum() / (1 + (len(several) - 1) / 4))
    return {
        name: Spread(variance / seeds, by_users / seeds, freedom) if seeds > 1 else Spread()
        for name, seeds in zip(values, map(len, values.values()), strict=True)
    }


def _seed_variances(values_SxR: np.ndarray, user_R: np.ndarray) -> tuple[float, float]:
    """The variance of the seeds' means, and what users explain of it."""
    (seeds, rows), mean_S = values_SxR.shape, values_SxR.mean(axis=1)
    own_SxR = values_SxR - mean_S[:, None]
    number_R, users = pd.factorize(user_R)
    rest_SxR = own_SxR - own_SxR.mean(axis=0)
    sum_SxU = np.stack([np.bincount(number_R, rest_R, len(users)) for rest_R in rest_SxR])
    return float(np.var(mean_S, ddof=1)), float(np.sum(sum_SxU**2) / ((seeds - 1) * rows**2))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Adjusted p-values (Holm, 1979): all below a level hold together at this level."""
    ascending = sorted(p_values, key=p_values.__getitem__)
    left = np.arange(len(ascending), 0, -1)
    stepped = np.maximum.accumulate(left * [p_values[name] for name in ascending])
    adjusted = dict(zip(ascending, np.minimum(stepped, 1.0).tolist(), strict=True))
    return {name: adjusted[name] for name in p_values}


def _noise(
    spread_J: Sequence[Spread], draws: int, seed: int, scale_J: np.ndarray | float = 1.0
) -> np.ndarray:
    """float64 [W, J]: what seeds do, drawn; the same for the same spread, seed and draws."""
    drawn = {}
    for freedom in {one.freedom for one in spread_J}:
        rng = np.random.default_rng([seed, freedom])
        drawn[freedom] = rng.standard_normal(draws), freedom / rng.chisquare(freedom, draws)
    noise = []
    for variance, by_users, freedom in spread_J:
        normal_W, times_W = drawn[freedom]
        noise.append(normal_W * np.sqrt(np.maximum(variance * times_W - by_users, 0.0)))
    return np.stack(noise, axis=1) * scale_J
