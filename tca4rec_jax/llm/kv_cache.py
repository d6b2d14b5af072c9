"""Keys and values of earlier tokens: the prompt's, and a pool of slots that a user's beams share.

    prompt of a user      [p0 p1 p2 p3 ..]               read once, seen by all beams
    pool of a user        [ a  b  c  d  e  .  .  . ]     capacity 8, 5 slots used
    slots of each beam      beam 0:  1  1  .  .  1       a b e   (`seen`, one row of bools a beam)
                            beam 1:  1  .  1  1  .       a c d
    positions               0  1  1  2  2                counted from the prompt's end

New tokens take the next free slots (`append_tokens`, `scatter_cache`). A slot is written once and
never moves: to choose beams anew (`gather_beams`) copies rows of `seen`, and no keys or values.
When the slots of a pool run out, it grows (`grow_cache`).

Beams read different numbers of tokens, so a call packs the tokens that are real (`Packing`):

    [B, M, E] --pack--> [Tp], as the layers run them --by_user--> [B, Tu], as they attend

Axes: core/__init__.py; the rows B are users, E new tokens of a beam, Sl slots of a user's pool,
Tp tokens of a packed call, Tu tokens that one user has in it, Kv key-value heads, H head dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, in the dtype of the activations.

    Prompts are [B, L, Kv, S, H], pools [B, L, Kv, Sl, H], as attention reads them; those of new
    tokens [L, B, Tu, Kv, H], as layers make them.
    """

    k: jax.Array
    v: jax.Array


class BeamPaths(NamedTuple):
    """Which slots of the users' pools hold the tokens that each beam has read after its prompt."""

    used_B: jax.Array  # int32, slots that are taken: the first ones
    position_BxSl: jax.Array  # int32, position of a slot's token, counted from the prompt's end
    seen_BxMxSl: jax.Array  # bool, the slots on a beam's path
    length_BxM: jax.Array  # int32, tokens that a beam has read


class NewTokens(NamedTuple):
    """The tokens that a call has read, for `scatter_cache` to put into a BeamCache."""

    kv: KVCache  # [L, B, Tu, Kv, H]
    slot_BxTu: jax.Array  # int32, where each token goes; the capacity and above: nowhere
    paths: BeamPaths  # of the beams after these tokens


class BeamCache(NamedTuple):
    """The tokens that the beams of each user have read, in a pool that these beams share."""

    kv: KVCache  # [B, L, Kv, Sl, H]
    paths: BeamPaths

    @property
    def capacity(self) -> int:
        """Slots of a user's pool."""
        return self.paths.position_BxSl.shape[1]

    def first_slots(self, count: int) -> "BeamCache":
        """The same pools without the slots after the first `count`."""
        position_BxSl = self.paths.position_BxSl[:, :count]
        seen_BxMxSl = self.paths.seen_BxMxSl[:, :, :count]
        paths = self.paths._replace(position_BxSl=position_BxSl, seen_BxMxSl=seen_BxMxSl)
        return BeamCache(jax.tree.map(lambda values: values[:, :, :, :count], self.kv), paths)


def init_paths(batch: int, beams: int, capacity: int) -> BeamPaths:
    """The paths of beams that have read nothing, in pools of `capacity` slots."""
    return BeamPaths(
        used_B=jnp.zeros(batch, jnp.int32),
        position_BxSl=jnp.zeros((batch, capacity), jnp.int32),
        seen_BxMxSl=jnp.zeros((batch, beams, capacity), bool),
        length_BxM=jnp.zeros((batch, beams), jnp.int32),
    )


def append_tokens(paths: BeamPaths, count_BxM: jax.Array, most: int) -> tuple[jax.Array, BeamPaths]:
    """Takes slots for the next `count` (int32, at most `most` = E) tokens of each beam.

    Returns (int32 [B, M, E], the slot of each token, the capacity for filler; the new paths).
    """
    capacity = paths.position_BxSl.shape[1]
    real_BxMxE = jnp.arange(most)[None, None, :] < count_BxM[:, :, None]
    real_BxX = real_BxMxE.reshape(real_BxMxE.shape[0], -1)
    rank_BxX = jnp.cumsum(real_BxX, axis=1, dtype=jnp.int32) - 1
    slot_BxX = jnp.where(real_BxX, paths.used_B[:, None] + rank_BxX, capacity)
    slot_BxMxE = slot_BxX.reshape(real_BxMxE.shape)
    position_BxMxE = paths.length_BxM[:, :, None] + jnp.arange(most, dtype=jnp.int32)[None, None, :]
    # Mapped over users, not indexed by them: a sharded batch then stays where it is.
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))
    mark = jax.vmap(jax.vmap(lambda old, slot: old.at[slot].set(True, mode="drop")))
    return slot_BxMxE, BeamPaths(
        paths.used_B + jnp.sum(count_BxM, axis=1),
        put(paths.position_BxSl, slot_BxX, position_BxMxE.reshape(slot_BxX.shape)),
        mark(paths.seen_BxMxSl, slot_BxMxE),
        paths.length_BxM + count_BxM,
    )


def scatter_cache(cache: BeamCache, new: NewTokens) -> BeamCache:
    """The cache with the new tokens in their slots."""

    def put(old_LxKvxSlxH, new_LxTuxKvxH, slot_Tu):
        return old_LxKvxSlxH.at[:, :, slot_Tu].set(new_LxTuxKvxH.swapaxes(1, 2), mode="drop")

    over_users = jax.vmap(put, in_axes=(0, 1, 0))
    pools = zip(cache.kv, new.kv, strict=True)
    return BeamCache(KVCache(*(over_users(*pair, new.slot_BxTu) for pair in pools)), new.paths)


def over_taken_slots(function: Callable[[BeamCache], jax.Array], cache: BeamCache) -> jax.Array:
    """function(cache), which looks at taken slots only; on a CPU with few slots besides those.

    None, a quarter and all slots are what it is compiled for. Other devices do not wait for
    arithmetic here, but would for the choice.
    """
    counts = sorted({0, cache.capacity // 4, cache.capacity})
    smallest = jnp.sum(jnp.array(counts) < jnp.max(cache.paths.used_B))

    def over(count):
        return lambda: function(cache.first_slots(count))

    def over_few():
        return jax.lax.switch(smallest, [over(count) for count in counts])

    return jax.lax.platform_dependent(cpu=over_few, default=over(cache.capacity))


def pad_new_tokens(new: NewTokens, per_user: int) -> NewTokens:
    """The same tokens with filler up to `per_user` for each user; the filler goes nowhere."""
    kv = jax.tree.map(lambda values: _pad(values, 2, per_user), new.kv)
    slot_BxTu = _pad(new.slot_BxTu, 1, per_user, jnp.iinfo(jnp.int32).max)
    return NewTokens(kv, slot_BxTu, new.paths)


def _pad(array: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=value)


def gather_beams(cache: BeamCache, beam_BxM: jax.Array) -> BeamCache:
    """The cache with the beams of each user chosen anew (int32, some perhaps twice)."""
    paths = cache.paths._replace(
        seen_BxMxSl=jnp.take_along_axis(cache.paths.seen_BxMxSl, beam_BxM[:, :, None], axis=1),
        length_BxM=jnp.take_along_axis(cache.paths.length_BxM, beam_BxM, axis=1),
    )
    return cache._replace(paths=paths)


def grow_cache(cache: BeamCache, capacity: int) -> BeamCache:
    """The cache with its pools enlarged to `capacity` slots."""
    paths = cache.paths._replace(
        position_BxSl=_pad(cache.paths.position_BxSl, 1, capacity),
        seen_BxMxSl=_pad(cache.paths.seen_BxMxSl, 2, capacity),
    )
    return BeamCache(jax.tree.map(lambda values: _pad(values, 3, capacity), cache.kv), paths)


class Packing(NamedTuple):
    """How the new tokens of a call are packed."""

    pack: Callable[[jax.Array], jax.Array]  # from [B, M, E, ...]
    by_user: Callable[[jax.Array], jax.Array]  # [Tp, ...] -> [B, Tu, ...], with filler at the end
    from_users: Callable[[jax.Array], jax.Array]  # [B, Tu, ...] -> [Tp, ...]
    beam_BxTu: jax.Array  # int32, the beam that reads a token; -1 for filler
    position_BxTu: jax.Array  # int32, a token's position in [0, E) among its beam's new tokens


def pack(x_BxMxE: jax.Array, kept_Tp: jax.Array) -> jax.Array:
    """[B, M, E, ...] -> [Tp, ...]: the tokens with these (int32) indices into B * M * E."""
    return x_BxMxE.reshape(-1, *x_BxMxE.shape[3:]).at[kept_Tp].get(mode="clip")


def packing(shape: tuple[int, ...], kept_Tp: jax.Array, per_user: int) -> Packing:
    """How tokens of shape [B, M, E] are packed.

    kept_Tp: int32, ascending indices into B * M * E of the tokens that run, at most `per_user` (Tu)
    of each user; indices past the end are padding.
    """
    (batch, beams, most), count = shape, kept_Tp.shape[0]
    of_user = beams * most
    user_Tp = kept_Tp // of_user
    taken_B = jnp.zeros(batch, jnp.int32).at[user_Tp].add(1, mode="drop")
    first_B = jnp.cumsum(taken_B) - taken_B
    rank_Tp = jnp.arange(count) - first_B.at[user_Tp].get(mode="clip")
    row_Tp = user_Tp * per_user + rank_Tp  # in [B * Tu]
    index = jnp.full(batch * per_user, count).at[row_Tp].set(jnp.arange(count), mode="drop")

    def by_user(x):
        return x.at[index].get(mode="clip").reshape(batch, per_user, *x.shape[1:])

    def from_users(x):
        return x.reshape(-1, *x.shape[2:]).at[row_Tp].get(mode="clip")

    kept_BxTu = by_user(kept_Tp)
    is_real_BxTu = index.reshape(batch, per_user) < count
    beam_BxTu = jnp.where(is_real_BxTu, kept_BxTu // most % beams, -1)
    return Packing(lambda x: pack(x, kept_Tp), by_user, from_users, beam_BxTu, kept_BxTu % most)
