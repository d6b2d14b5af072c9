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
    """How far a mean would lie from itself, had what is not in the rows come out otherwise."""

    standard_error: float = 0.0
    freedom: int = 1  # degrees of freedom of its estimate


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


def seed_spread(values_SxR: np.ndarray, user_R: np.ndarray) -> Spread:
    """How far the mean over seeds and rows would lie from itself with other seeds.

    Of the same rows under models trained with S seeds, float [S, R]. Three seeds drawn from three
    have two thirds of their variance, and intervals of such draws leave the truth out far too
    often. So users, who are many, are resampled, and the seeds' part is drawn from Student's t with
    S - 1 degrees of freedom. Its variance is that of the seeds' means, less what these differ by
    since users differ in which seed's model they like: users who are resampled bring that with
    them. (Means over readers crossed with cases: Dorfman, Berbaum and Metz, 1992; Hillis, 2007.)
    One seed has no spread: it says nothing of others.
    """
    seeds, rows = values_SxR.shape
    if seeds == 1:
        return Spread()
    mean_S = values_SxR.mean(axis=1)
    own_SxR = values_SxR - mean_S[:, None]
    number_R, users = pd.factorize(user_R)
    residual = own_SxR - own_SxR.mean(axis=0)
    sum_SxU = np.stack([np.bincount(number_R, one_R, len(users)) for one_R in residual])
    by_users = np.sum(sum_SxU**2) / ((seeds - 1) * rows**2)
    beyond = max(float(np.var(mean_S, ddof=1) - by_users), 0.0)
    return Spread((beyond / seeds) ** 0.5, seeds - 1)


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
    """float64 [W, J]: what is not in the rows, drawn; the same for the same spread, seed, draws."""
    t_W = {
        freedom: np.random.default_rng([seed, freedom]).standard_t(freedom, draws)
        for freedom in {one.freedom for one in spread_J}
    }
    return np.stack([one.standard_error * t_W[one.freedom] for one in spread_J], axis=1) * scale_J
