"""Keys and values of earlier tokens: where new ones go, and which tokens are run.

Axis letters: B batch, S sequence, M beams, E new tokens of an edge, W suffix tokens, K kv heads, H
head dim, L layers, T tokens that run.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Rotated keys and values of every layer: [L, B, S, K, H] or, for beams, [L, B, M, W, K, H]."""

    k: jax.Array
    v: jax.Array


def write_suffix(suffix: KVCache, new: KVCache, suffix_lengths_BxM: jax.Array) -> KVCache:
    """Puts new [L, B, M, E, K, H] into the slots suffix_length + e of suffix [L, B, M, W, K, H]."""

    def write(old_LxWxKxH, new_LxExKxH, length):
        slots_E = length + jnp.arange(new_LxExKxH.shape[1])
        return old_LxWxKxH.at[:, slots_E].set(new_LxExKxH, mode="drop")

    # Mapped over users and beams, not indexed by them: a sharded batch then stays where it is.
    over_beams = jax.vmap(write, in_axes=(1, 1, 0), out_axes=1)
    write = jax.vmap(over_beams, in_axes=(1, 1, 0), out_axes=1)
    return KVCache(
        write(suffix.k, new.k, suffix_lengths_BxM), write(suffix.v, new.v, suffix_lengths_BxM)
    )


def packing(
    shape: tuple[int, ...], kept_T: jax.Array | None
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """(pack [*shape, ...] -> [T, ...], unpack back); both do nothing if all tokens are kept."""
    if kept_T is None:
        return (lambda x: x), (lambda x: x)
    size, count = math.prod(shape), kept_T.shape[0]
    place = jnp.zeros(size, jnp.int32).at[kept_T].set(jnp.arange(count), mode="drop")

    def pack(x):
        return x.reshape(size, *x.shape[len(shape) :]).at[kept_T].get(mode="clip")

    return pack, lambda x_T: x_T[place].reshape(*shape, *x_T.shape[1:])
