"""Ranks of targets; HR@K, NDCG@K and MRR@K; AUC of answers.

Ranks are 0-based, and -1 for a target that is not in a list of recommendations. Metrics are over
the whole catalogue unless candidates are drawn (evaluation.candidates).

By item, a hit is the target item itself; items that share a title stand in a list one after the
other in catalogue order. By title (as published), a hit is the target's title, whichever of the
items with that title was meant; a title takes one place in the list.

Axis letters: R rows, B rows of one batch, I items, M places of a list, U users, W resamples.
"""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from tca4rec_jax.intervals import RESAMPLES, Interval, resampled_users

CUTOFFS = (1, 3, 5, 10)


def ahead_of(
    scores_BxI: jax.Array, item_I: jax.Array, target_score_B: jax.Array, target_B: jax.Array
) -> jax.Array:
    """Whether items stand before each row's target, bool [B, I]; traceable.

    In a stable sort by descending score: they score higher, or the same and come earlier in the
    catalogue, whose items `item_I` are.
    The target never does, even if another program made its score and rounded it differently.
    """
    score_Bx1, target_Bx1 = target_score_B[:, None], target_B[:, None]
    higher_BxI = (scores_BxI > score_Bx1) & (item_I[None, :] != target_Bx1)
    return higher_BxI | ((scores_BxI == score_Bx1) & (item_I[None, :] < target_Bx1))


def rank_in_list(listed_RxM: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """The 0-based rank of each row's target in its list, int32 [R]; -1 if it is not there.

    The lists (-1 where one is shorter) hold items, or for metrics by title trie leaves, and so do
    the targets. Raises ValueError for shapes that do not fit, negative targets, repeated entries.
    """
    if listed_RxM.ndim != 2 or target_R.shape != listed_RxM.shape[:1]:
        shapes = f"{listed_RxM.shape} and {target_R.shape}"
        raise ValueError(f"expected lists [rows, places] and one target per row, got {shapes}")
    for row in np.flatnonzero(target_R < 0):
        raise ValueError(f"row {row}: target {target_R[row]} is not an index")
    sorted_RxM = np.sort(listed_RxM, axis=1)
    twice_RxM = (sorted_RxM[:, 1:] == sorted_RxM[:, :-1]) & (sorted_RxM[:, 1:] >= 0)
    for row in np.flatnonzero(twice_RxM.any(axis=1)):
        raise ValueError(f"row {row}: the list {listed_RxM[row].tolist()} repeats an entry")
    hit_RxM = listed_RxM == target_R[:, None]
    return np.where(hit_RxM.any(axis=1), hit_RxM.argmax(axis=1), -1).astype(np.int32)


def hit_rate(ranks_R: np.ndarray, k: int) -> np.ndarray:
    """HR@k of each row, float64 [R]: 1 if the target is among the first k, else 0.

    Raises ValueError if k is below 1 or the ranks are no integers.
    """
    if k < 1:
        raise ValueError(f"K of a ranking metric must be at least 1, got {k}")
    if not np.issubdtype(ranks_R.dtype, np.integer):
        raise ValueError(f"ranks must be integers (0-based, -1 for absent), got {ranks_R.dtype}")
    return ((ranks_R >= 0) & (ranks_R < k)).astype(np.float64)


def ndcg(ranks_R: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each row with its one relevant item, float64 [R]: 1 / log2(rank + 2) or 0.

    (With the 1-based rank of the literature that is 1 / log2(rank + 1).) Raises as `hit_rate`.
    """
    return hit_rate(ranks_R, k) / np.log2(np.maximum(ranks_R, 0) + 2.0)


def reciprocal_rank(ranks_R: np.ndarray, k: int) -> np.ndarray:
    """1 / (rank + 1) of each row, or 0 beyond the first k, float64 [R]: MRR@k is its mean.

    Raises as `hit_rate`.
    """
    return hit_rate(ranks_R, k) / (np.maximum(ranks_R, 0) + 1.0)


def metric_values(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """The metrics of each row: {'hr@K' | 'ndcg@K' | 'mrr@K': float64 [R]}."""
    kinds = {"hr": hit_rate, "ndcg": ndcg, "mrr": reciprocal_rank}
    return {f"{name}@{k}": of(ranks_R, k) for name, of in kinds.items() for k in cutoffs}


def mean_metrics(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over rows, keyed as in `metric_values`; raises ValueError if there are no rows."""
    if len(ranks_R) == 0:
        raise ValueError("there are no rows to take the mean of a ranking metric over")
    return {name: float(value.mean()) for name, value in metric_values(ranks_R, cutoffs).items()}


def auc(scores_R: np.ndarray, yes_R: np.ndarray, weight_WxR: np.ndarray) -> np.ndarray:
    """The area under the ROC curve at several weights of the rows, float64 [W].

    The share of (yes, no) pairs of rows whose scores are in this order; equal ones count half. NaN
    where the rows with a weight have one answer.
    """
    _, group_R = np.unique(scores_R, return_inverse=True)
    order_R = np.argsort(group_R, kind="stable")
    begins = np.flatnonzero(np.diff(group_R[order_R], prepend=-1))
    yes_WxG, no_WxG = (
        np.add.reduceat((weight_WxR * of_R)[:, order_R], begins, axis=1) for of_R in (yes_R, ~yes_R)
    )
    below_WxG = np.cumsum(no_WxG, axis=1) - no_WxG / 2
    pairs_W = yes_WxG.sum(axis=1) * no_WxG.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.sum(yes_WxG * below_WxG, axis=1) / pairs_W


def answer_metrics(
    scores_R: np.ndarray,
    yes_R: np.ndarray,
    user_R: np.ndarray,
    *,
    baseline_R: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[str, Interval]:
    """'auc', over all rows, and 'uauc', its mean over users with both answers; {} if undefined.

    With a baseline, other scores of the same rows, the differences from its. The intervals resample
    users with all of their rows: those of one user are not independent.
    """
    if yes_R.all() or not yes_R.any():
        return {}
    every = [scores_R] if baseline_R is None else [scores_R, baseline_R]
    users, number_R = np.unique(user_R, return_inverse=True)
    order_R = np.argsort(number_R, kind="stable")
    of_user = np.split(order_R, np.cumsum(np.bincount(number_R))[:-1])
    auc_SxU = np.array(
        [[auc(s[r], yes_R[r], np.ones((1, r.size)))[0] for r in of_user] for s in every]
    )
    both_U, values = ~np.isnan(auc_SxU[0]), []
    themselves = np.ones((1, len(users)), np.int64)
    for times_WxU in itertools.chain([themselves], resampled_users(len(users), resamples, seed)):
        of_rows = [auc(s, yes_R, times_WxU[:, number_R]) for s in every]
        times_WxU = times_WxU[:, both_U]
        with np.errstate(invalid="ignore"):  # NaN where no user has both answers
            within = [times_WxU @ auc_U[both_U] / times_WxU.sum(axis=1) for auc_U in auc_SxU]
        values.append((of_rows, within))
    tail, found = (1 - level) / 2, {}
    for name, parts in zip(("auc", "uauc"), zip(*values, strict=True), strict=True):
        own_W, *baseline = np.concatenate(parts, axis=1)
        mean, *resampled = own_W - baseline[0] if baseline else own_W
        if np.isfinite(mean):
            low, high = np.nanquantile(resampled, [tail, 1 - tail])
            found[name] = Interval(float(mean), float(low), float(high))
    return found


def coverage(items_RxM: np.ndarray, num_items: int) -> float:
    """The share of the items that are in any list; -1 is none."""
    return np.count_nonzero(np.unique(items_RxM) >= 0) / num_items


def metric_differences(
    ranks_R: np.ndarray, baseline_ranks_R: np.ndarray, k: int
) -> dict[str, np.ndarray]:
    """Paired differences (model - baseline) of each row: {'hr@k' | 'ndcg@k': float64 [R]}.

    Raises ValueError if the two were not ranked over the same number of rows.
    """
    if ranks_R.shape != baseline_ranks_R.shape:
        sizes = f"{len(ranks_R)} and {len(baseline_ranks_R)} ranks"
        raise ValueError(f"a difference needs the same rows in the same order, got {sizes}")
    values, baseline = (metric_values(ranks, (k,)) for ranks in (ranks_R, baseline_ranks_R))
    return {name: values[name] - baseline[name] for name in (f"hr@{k}", f"ndcg@{k}")}
