"""Full ranking: the rank of the target among all items, and HR@K and NDCG@K from ranks.

Ranks are 0-based; -1 stands for a target that was not recommended at all (a list of
recommendations shorter than the catalogue). Metrics are over the whole catalogue, never over
sampled candidates.

Axis letters: R rows, B rows of one batch, I items.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1
CUTOFFS = (1, 3, 5, 10)


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


_rank_in_batch = jax.jit(rank_in_batch)


def rank_of_target(
    scores_RxI: np.ndarray, target_R: np.ndarray, *, batch_size: int = 1024
) -> np.ndarray:
    """The 0-based rank of each row's target among all items, int32 [R].

    Args:
      scores_RxI: float [R, I], higher is better.
      target_R: int [R], item indices in 0..I-1.
      batch_size: rows ranked by one call of the jitted program; the last batch is padded.

    Raises:
      ValueError: shapes that do not fit, a target outside the catalogue, or a score that is NaN
        (a NaN compares false with everything and would silently rank as the best).
    """
    scores_RxI, target_R = np.asarray(scores_RxI), np.asarray(target_R)
    _check_scores(scores_RxI, target_R)
    num_rows = len(target_R)
    ranks_R = np.empty(num_rows, np.int32)
    size = min(batch_size, max(num_rows, 1))
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        missing = size - (stop - start)
        scores_BxI = np.pad(scores_RxI[start:stop], ((0, missing), (0, 0)))
        target_B = np.pad(target_R[start:stop], (0, missing)).astype(np.int32)
        ranks_R[start:stop] = np.asarray(_rank_in_batch(scores_BxI, target_B))[: stop - start]
    return ranks_R


def _check_scores(scores_RxI: np.ndarray, target_R: np.ndarray) -> None:
    if scores_RxI.ndim != 2 or target_R.shape != scores_RxI.shape[:1]:
        raise ValueError(
            f"expected scores [rows, items] and one target per row, got scores of shape "
            f"{scores_RxI.shape} and targets of shape {target_R.shape}"
        )
    outside = np.flatnonzero((target_R < 0) | (target_R >= scores_RxI.shape[1]))
    if outside.size:
        raise ValueError(
            f"row {outside[0]}: target {target_R[outside[0]]} is not an item index; expected "
            f"0..{scores_RxI.shape[1] - 1}"
        )
    bad = np.flatnonzero(np.isnan(scores_RxI).any(axis=1))
    if bad.size:
        raise ValueError(f"row {bad[0]}: scores contain NaN; a rank is not defined for it")


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


def mean_metrics(ranks_R: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over rows, keyed 'hr@K' and 'ndcg@K'; raises ValueError if there are no rows."""
    if len(ranks_R) == 0:
        raise ValueError("there are no rows to take the mean of a ranking metric over")
    metrics = {f"hr@{k}": float(hit_rate(ranks_R, k).mean()) for k in cutoffs}
    return metrics | {f"ndcg@{k}": float(ndcg(ranks_R, k).mean()) for k in cutoffs}


def _checked_ranks(ranks_R: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise ValueError(f"K of a ranking metric must be at least 1, got {k}")
    ranks_R = np.asarray(ranks_R)
    if not np.issubdtype(ranks_R.dtype, np.integer):
        raise ValueError(f"ranks must be integers (0-based, -1 for absent), got {ranks_R.dtype}")
    return ranks_R
