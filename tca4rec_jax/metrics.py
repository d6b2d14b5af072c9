"""Ranks of targets, HR@K and NDCG@K, and bootstrap intervals.

Ranks are 0-based, and -1 for a target that is not in a list of recommendations. Metrics are over
the whole catalogue, never over sampled candidates.

By item, a hit is the target item itself; items that share a title stand in a list one after the
other in catalogue order. By title (as published), a hit is the target's title, whichever of the
items with that title was meant; a title takes one place in the list.

Axis letters: R rows, B rows of one batch, I items, M places of a list, J metrics.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1
CUTOFFS = (1, 3, 5, 10)
RESAMPLES = 2000
LEVEL = 0.95
_RESAMPLES_AT_ONCE = 128  # bounds the memory of the resampling counts


def rank_in_batch(scores_BxI: jax.Array, target_B: jax.Array) -> jax.Array:
    """The 0-based rank of each row's target, int32 [B]; traceable.

    The rank is the number of items that score strictly higher, plus the number of items that score
    the same and come earlier in the catalogue. So it is the position of the target in a stable sort
    by descending score, and every target has exactly one rank however many items tie.
    """
    target_Bx1 = target_B[:, None]
    target_score_Bx1 = jnp.take_along_axis(scores_BxI, target_Bx1, axis=1)
    earlier_BxI = jnp.arange(scores_BxI.shape[1])[None, :] < target_Bx1
    ahead_BxI = (scores_BxI > target_score_Bx1) | ((scores_BxI == target_score_Bx1) & earlier_BxI)
    return jnp.sum(ahead_BxI, axis=1, dtype=jnp.int32)


def rank_in_list(listed_RxM: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """The 0-based rank of each row's target in its list, int32 [R]; ABSENT if it is not there.

    For metrics by item pass items and target items; for metrics by title pass trie leaves and
    `trie.leaf_of_item[target]`.

    Args:
      listed_RxM: int [R, M], best first, -1 where a list is shorter.
      target_R: int [R], at least 0.

    Raises:
      ValueError: shapes that do not fit, a negative target, or an entry that a list holds twice
        (a repeated hit would count twice).
    """
    listed_RxM, target_R = np.asarray(listed_RxM), np.asarray(target_R)
    if listed_RxM.ndim != 2 or target_R.shape != listed_RxM.shape[:1]:
        raise ValueError(
            f"expected lists [rows, places] and one target per row, got lists of shape "
            f"{listed_RxM.shape} and targets of shape {target_R.shape}"
        )
    if (target_R < 0).any():
        row = int(np.argmax(target_R < 0))
        raise ValueError(f"row {row}: target {target_R[row]} is not an index")
    sorted_RxM = np.sort(listed_RxM, axis=1)
    twice_R = ((sorted_RxM[:, 1:] == sorted_RxM[:, :-1]) & (sorted_RxM[:, 1:] >= 0)).any(axis=1)
    if twice_R.any():
        row = int(np.argmax(twice_R))
        raise ValueError(f"row {row}: the list {listed_RxM[row].tolist()} repeats an entry")
    hit_RxM = listed_RxM == target_R[:, None]
    if listed_RxM.shape[1] == 0:
        return np.full(len(target_R), ABSENT, np.int32)
    return np.where(hit_RxM.any(axis=1), hit_RxM.argmax(axis=1), ABSENT).astype(np.int32)


def hit_rate(ranks_R: np.ndarray, k: int) -> np.ndarray:
    """HR@k of each row, float64 [R]: 1 if the target is among the first k, else 0."""
    ranks_R = _checked_ranks(ranks_R, k)
    return ((ranks_R >= 0) & (ranks_R < k)).astype(np.float64)


def ndcg(ranks_R: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each row with its one relevant item, float64 [R]: 1 / log2(rank + 2) or 0.

    (With the 1-based rank of the literature that is 1 / log2(rank + 1).)
    """
    ranks_R = _checked_ranks(ranks_R, k)
    return hit_rate(ranks_R, k) / np.log2(np.maximum(ranks_R, 0) + 2.0)


def metric_values(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """The metrics of each row: {'hr@K' | 'ndcg@K': float64 [R]}."""
    values = {f"hr@{k}": hit_rate(ranks_R, k) for k in cutoffs}
    return values | {f"ndcg@{k}": ndcg(ranks_R, k) for k in cutoffs}


def mean_metrics(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over rows, keyed 'hr@K' and 'ndcg@K'; raises ValueError if there are no rows."""
    if len(ranks_R) == 0:
        raise ValueError("there are no rows to take the mean of a ranking metric over")
    return {name: float(value.mean()) for name, value in metric_values(ranks_R, cutoffs).items()}


def _checked_ranks(ranks_R: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise ValueError(f"K of a ranking metric must be at least 1, got {k}")
    ranks_R = np.asarray(ranks_R)
    if not np.issubdtype(ranks_R.dtype, np.integer):
        raise ValueError(f"ranks must be integers (0-based, -1 for absent), got {ranks_R.dtype}")
    return ranks_R


class Interval(NamedTuple):
    """A mean over rows and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap_intervals(
    values: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Means over rows with percentile bootstrap intervals; all metrics share the resampled rows.

    Args:
      values: {name: float [R]}, the same R for all.
      seed: of the resampling; the same seed and R resample the same rows.
      resamples: how often R rows are drawn with replacement.
      level: coverage, between 0 and 1.

    Raises:
      ValueError: no metric, no rows, different numbers of rows, a value that is not finite, or
        arguments out of range.
    """
    sizes = {name: np.shape(column) for name, column in values.items()}
    if not values or any(shape != next(iter(sizes.values())) for shape in sizes.values()):
        raise ValueError(f"expected at least one metric, all over the same rows, got {sizes}")
    values_RxJ = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=-1)
    if values_RxJ.ndim != 2 or len(values_RxJ) == 0:
        raise ValueError(f"expected one value per row and at least one row, got {sizes}")
    if not np.isfinite(values_RxJ).all():
        row, column = np.argwhere(~np.isfinite(values_RxJ))[0]
        raise ValueError(f"row {row}: {list(values)[column]} is {values_RxJ[row, column]}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"need resamples >= 1 and 0 < level < 1, got {resamples} and {level}")

    rng = np.random.default_rng(seed)
    num_rows = len(values_RxJ)
    share_R = np.full(num_rows, 1 / num_rows)
    means = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        # Drawing rows with replacement and counting them is one multinomial draw.
        counts = rng.multinomial(num_rows, share_R, size=size)
        means.append(counts @ values_RxJ / num_rows)
    tail = (1 - level) / 2
    low_J, high_J = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    mean_J = values_RxJ.mean(axis=0)
    return {
        name: Interval(float(mean_J[j]), float(low_J[j]), float(high_J[j]))
        for j, name in enumerate(values)
    }


def ranking_metrics(
    ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS, *, seed: int = 0
) -> dict[str, Interval]:
    """HR@K and NDCG@K over rows, each with its interval; see `bootstrap_intervals`."""
    return bootstrap_intervals(metric_values(ranks_R, cutoffs), seed=seed)


def paired_differences(
    ranks_R: np.ndarray,
    baseline_ranks_R: np.ndarray,
    cutoffs: Sequence[int] = CUTOFFS,
    *,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean differences (model - baseline) over the same rows, with paired bootstrap intervals.

    An interval that contains 0 does not establish a difference.

    Raises:
      ValueError: the two were not ranked over the same number of rows.
    """
    if np.shape(ranks_R) != np.shape(baseline_ranks_R):
        raise ValueError(
            f"a paired difference needs the same rows in the same order, got ranks of shape "
            f"{np.shape(ranks_R)} and {np.shape(baseline_ranks_R)}"
        )
    values = metric_values(ranks_R, cutoffs)
    baseline = metric_values(baseline_ranks_R, cutoffs)
    differences = {name: values[name] - baseline[name] for name in values}
    return bootstrap_intervals(differences, seed=seed)
