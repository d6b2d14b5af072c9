"""HR@K and NDCG@K of recommended lists, by item and by title, with bootstrap intervals.

By item, a hit is the target item itself; items that share a title stand in the list one after the
other in catalogue order. By title (as published), a hit is the target's title, whichever of the
items with that title was meant; a title takes one place in the list.

Axis letters: R rows, M beams (leaves recommended), K places of a list, J metrics.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tca4rec_jax.metrics import CUTOFFS, hit_rate, ndcg

RESAMPLES = 2000
LEVEL = 0.95
_RESAMPLES_AT_ONCE = 128  # bounds the memory of the resampling counts


class Interval(NamedTuple):
    """A mean over rows and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def rank_in_list(listed_RxK: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """The 0-based place of each row's target in its list, int32 [R]; -1 if it is not there.

    Pass items and target items for metrics by item, leaves and `trie.leaf_of_item[target]` for
    metrics by title.

    Args:
      listed_RxK: int [R, K], best first, -1 where a list is shorter.
      target_R: int [R], at least 0.

    Raises:
      ValueError: shapes that do not fit, a negative target, or an entry that a list holds twice
        (a repeated hit would count twice).
    """
    listed_RxK, target_R = np.asarray(listed_RxK), np.asarray(target_R)
    if listed_RxK.ndim != 2 or target_R.shape != listed_RxK.shape[:1]:
        raise ValueError(
            f"expected lists [rows, places] and one target per row, got lists of shape "
            f"{listed_RxK.shape} and targets of shape {target_R.shape}"
        )
    if (target_R < 0).any():
        row = int(np.argmax(target_R < 0))
        raise ValueError(f"row {row}: target {target_R[row]} is not an index")
    sorted_RxK = np.sort(listed_RxK, axis=1)
    twice_R = ((sorted_RxK[:, 1:] == sorted_RxK[:, :-1]) & (sorted_RxK[:, 1:] >= 0)).any(axis=1)
    if twice_R.any():
        row = int(np.argmax(twice_R))
        raise ValueError(f"row {row}: the list {listed_RxK[row].tolist()} repeats an entry")
    hit_RxK = listed_RxK == target_R[:, None]
    if listed_RxK.shape[1] == 0:
        return np.full(len(target_R), -1, np.int32)
    return np.where(hit_RxK.any(axis=1), hit_RxK.argmax(axis=1), -1).astype(np.int32)


def metric_values(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """The metrics of each row: {'hr@K' | 'ndcg@K': float64 [R]}."""
    values = {f"hr@{k}": hit_rate(ranks_R, k) for k in cutoffs}
    return values | {f"ndcg@{k}": ndcg(ranks_R, k) for k in cutoffs}


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
    ranks_R: np.ndarray,
    cutoffs: Sequence[int] = CUTOFFS,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """HR@K and NDCG@K over rows, each with its interval; see `bootstrap_intervals`."""
    values = metric_values(ranks_R, cutoffs)
    return bootstrap_intervals(values, seed=seed, resamples=resamples, level=level)


def paired_differences(
    ranks_R: np.ndarray,
    baseline_ranks_R: np.ndarray,
    cutoffs: Sequence[int] = CUTOFFS,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, Interval]:
    """Mean differences (model - baseline) over the same rows, with paired bootstrap intervals.

    An interval that holds 0 does not establish a difference.

    Raises:
      ValueError: the two were not ranked over the same number of rows.
    """
    if np.shape(ranks_R) != np.shape(baseline_ranks_R):
        raise ValueError(
            f"a paired difference needs the same rows in the same order, got ranks of shape "
            f"{np.shape(ranks_R)} and {np.shape(baseline_ranks_R)}"
        )
    ours = metric_values(ranks_R, cutoffs)
    theirs = metric_values(baseline_ranks_R, cutoffs)
    differences = {name: ours[name] - theirs[name] for name in ours}
    return bootstrap_intervals(differences, seed=seed, resamples=resamples, level=level)
