"""k-means and residual k-means (RQ-k-means) of item embeddings, plain or with clusters of one size.

Axis letters: n points, E their width, K codes, L levels, I items.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core import Array
from tca4rec_jax.semantic_ids.assignment import even_codes
from tca4rec_jax.terminal import Progress

_MOST_ROUNDS = 100
_MOST_BALANCED_ROUNDS = 5  # which need not settle: ten leave 0.5% less distance


class Quantised(NamedTuple):
    """Items as codes, level by level.

    Attributes:
      codes_IxL: int32.
      last_IxE: float32, what the last level quantises: the residuals before it.
      last_KxE: float32, the vectors of the last level's codes.
      left: by level, the share of the squared distance from the mean that is left after it.
    """

    codes_IxL: np.ndarray
    last_IxE: np.ndarray
    last_KxE: np.ndarray
    left: tuple[float, ...]


def residual_k_means(
    embedding_IxE: np.ndarray, codes: Sequence[int], *, balanced: bool, seed: int
) -> Quantised:
    """RQ-k-means: k-means, then k-means of what its centroids leave, and so on.

    Args:
      embedding_IxE: float32.
      codes: how many codes each level has.
      balanced: every code of a level has I // K items or one more.
      seed: of k-means++.
    """
    points_IxE = jnp.asarray(embedding_IxE - embedding_IxE.mean(axis=0))
    key, whole = jax.random.key(seed), float(jnp.square(points_IxE).mean())
    columns, left = [], []
    with Progress("RQ-k-means", len(codes), "levels") as progress:
        for level, num_codes in enumerate(codes):
            before_IxE = points_IxE
            centroid_KxE, code_I = k_means(
                before_IxE, jax.random.fold_in(key, level), num_codes, balanced=balanced
            )
            points_IxE = before_IxE - centroid_KxE[code_I]
            columns.append(np.asarray(code_I))
            left.append(float(jnp.square(points_IxE).mean()) / max(whole, 1e-30))
            progress.advance(1, f"{left[-1]:.3f} of the variance left")
    last = np.asarray(before_IxE), np.asarray(centroid_KxE)
    return Quantised(np.stack(columns, axis=1), *last, tuple(left))


@functools.partial(jax.jit, static_argnames=("num_codes", "balanced"))
def k_means(
    points_nxE: jax.Array, key: jax.Array, num_codes: int, *, balanced: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(centroids float32 [K, E], code of each point int32 [n]) by Lloyd's rounds from k-means++.

    A centroid without points moves to a point that is far from its own. `balanced` goes on from
    there with clusters of n // K points or one more.
    """
    nearest = functools.partial(jnp.argmin, axis=1)
    first_KxE = _plus_plus(points_nxE, key, num_codes)
    centroid_KxE, code_n = _settle(points_nxE, first_KxE, nearest, _MOST_ROUNDS)
    if balanced:
        return _settle(points_nxE, centroid_KxE, even_codes, _MOST_BALANCED_ROUNDS)
    return centroid_KxE, code_n


def _settle(
    points_nxE: jax.Array, first_KxE: jax.Array, choose: Callable, most_rounds: int
) -> tuple[jax.Array, jax.Array]:
    """Codes by `choose`, centroids by codes, in turn until the codes stay or rounds are over."""
    num_codes = len(first_KxE)

    def settle(state):
        centroid_KxE, old_n, _, number = state
        distance_nxK = squared_distances(points_nxE, centroid_KxE)
        code_n = choose(distance_nxK).astype(jnp.int32)
        own_n = jnp.take_along_axis(distance_nxK, code_n[:, None], axis=1)[:, 0]
        centroid_KxE = _means(points_nxE, code_n, own_n, num_codes)
        return centroid_KxE, code_n, (code_n != old_n).any(), number + 1

    def goes_on(state):
        return state[2] & (state[3] < most_rounds)

    nothing_n = jnp.full(points_nxE.shape[0], -1, jnp.int32)
    return jax.lax.while_loop(goes_on, settle, (first_KxE, nothing_n, True, 0))[:2]


def squared_distances(points_nxE: Array, centroid_KxE: Array) -> jax.Array:
    """float32 [n, K]."""
    product_nxK = jnp.matmul(points_nxE, centroid_KxE.T, precision=jax.lax.Precision.HIGHEST)
    norms_n, norms_K = (jnp.square(one).sum(axis=1) for one in (points_nxE, centroid_KxE))
    return jnp.maximum(norms_n[:, None] - 2 * product_nxK + norms_K[None, :], 0.0)


def _plus_plus(points_nxE: jax.Array, key: jax.Array, num_codes: int) -> jax.Array:
    """The first centroids, [K, E]: points drawn by their squared distance from those before.

    k-means++ (Arthur and Vassilvitskii 2007).
    """

    def draw(number, state):
        centroid_KxE, nearest_n = state
        at = jax.random.categorical(jax.random.fold_in(key, number), jnp.log(nearest_n))
        distance_n = squared_distances(points_nxE, points_nxE[at][None, :])[:, 0]
        return centroid_KxE.at[number].set(points_nxE[at]), jnp.minimum(nearest_n, distance_n)

    nowhere_KxE = jnp.zeros((num_codes, points_nxE.shape[1]), points_nxE.dtype)
    everywhere_n = jnp.ones(points_nxE.shape[0], points_nxE.dtype)
    # A constant above every distance: the first draw is even, the second by the distances.
    everywhere_n *= 4 * jnp.square(points_nxE).sum(axis=1).max()
    return jax.lax.fori_loop(0, num_codes, draw, (nowhere_KxE, everywhere_n))[0]


def _means(points_nxE: jax.Array, code_n: jax.Array, own_n: jax.Array, num_codes: int) -> jax.Array:
    """The mean of each code's points; of a code without any, one of the farthest points."""
    sum_KxE = jax.ops.segment_sum(points_nxE, code_n, num_codes)
    size_K = jax.ops.segment_sum(jnp.ones_like(own_n), code_n, num_codes)
    mean_KxE = sum_KxE / jnp.maximum(size_K, 1)[:, None]
    farthest = jax.lax.top_k(own_n, min(num_codes, own_n.size))[1]
    is_empty_K = size_K == 0
    far_K = farthest[jnp.minimum(jnp.cumsum(is_empty_K) - 1, farthest.size - 1)]
    return jnp.where(is_empty_K[:, None], points_nxE[far_K], mean_KxE)
