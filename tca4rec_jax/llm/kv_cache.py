"""Keys and values of earlier tokens: where new ones go, and which tokens are run.

Axis letters: B batch (users), S sequence, M beams, E new tokens of an edge, P slots of a
user's pool, K kv heads, H head dim, L layers, T tokens that run, Q of them of one user.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Rotated keys and values of all layers: prompts [L, B, S, K, H], pools [B, L, P, K, H].

    Users come first in a pool, for `written` addresses each user's slots.
    """

    k: jax.Array
    v: jax.Array


class Paths(NamedTuple):
    """Which slots of the users' pools hold what each beam has read after its prompt."""

    used_B: jax.Array  # int32, slots that are taken: the first ones
    place_BxP: jax.Array  # int32, a slot's token counted from the prompt's end
    seen_BxMxP: jax.Array  # bool, the slots on a beam's path
    length_BxM: jax.Array  # int32, tokens that a beam has read


class NewTokens(NamedTuple):
    """What a call has read, to be `written` into a BeamCache."""

    kv: KVCache  # [L, B, Q, K, H]
    slot_BxQ: jax.Array  # int32, where each goes; P and more: nowhere
    paths: Paths  # of the beams that have read them


class BeamCache(NamedTuple):
    """What the beams of each user have read, in a pool of slots that they share.

    A slot is written once and never moves: when beams are chosen, rows of `seen` are gathered and
    no keys or values, and what several beams have in common is held once.
    """

    kv: KVCache
    paths: Paths


def no_paths(batch: int, beams: int, slots: int) -> Paths:
    """Of beams that have read nothing yet."""
    return Paths(
        used_B=jnp.zeros(batch, jnp.int32),
        place_BxP=jnp.zeros((batch, slots), jnp.int32),
        seen_BxMxP=jnp.zeros((batch, beams, slots), bool),
        length_BxM=jnp.zeros((batch, beams), jnp.int32),
    )


def read_on(paths: Paths, count_BxM: jax.Array, edge: int) -> tuple[jax.Array, Paths]:
    """Takes slots for the next `count` (at most `edge`) tokens of each beam.

    Returns:
      (slot int32 [B, M, E] of each token, P for those that are none, the new paths).
    """
    slots = paths.place_BxP.shape[1]
    real_BxMxE = jnp.arange(edge)[None, None, :] < count_BxM[:, :, None]
    real_BxX = real_BxMxE.reshape(real_BxMxE.shape[0], -1)
    rank_BxX = jnp.cumsum(real_BxX, axis=1, dtype=jnp.int32) - 1
    slot_BxX = jnp.where(real_BxX, paths.used_B[:, None] + rank_BxX, slots)
    slot_BxMxE = slot_BxX.reshape(real_BxMxE.shape)
    place_BxMxE = paths.length_BxM[:, :, None] + jnp.arange(edge, dtype=jnp.int32)[None, None, :]
    # Mapped over users, not indexed by them: a sharded batch then stays where it is.
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))
    mark = jax.vmap(jax.vmap(lambda old, slot: old.at[slot].set(True, mode="drop")))
    return slot_BxMxE, Paths(
        paths.used_B + jnp.sum(count_BxM, axis=1),
        put(paths.place_BxP, slot_BxX, place_BxMxE.reshape(slot_BxX.shape)),
        mark(paths.seen_BxMxP, slot_BxMxE),
        paths.length_BxM + count_BxM,
    )


def written(cache: BeamCache, new: NewTokens) -> BeamCache:
    """The cache with the new tokens in their slots."""

    def put(old_LxPxKxH, new_LxQxKxH, slot_Q):
        return old_LxPxKxH.at[:, slot_Q].set(new_LxQxKxH, mode="drop")

    over_users = jax.vmap(put, in_axes=(0, 1, 0))
    pools = zip(cache.kv, new.kv, strict=True)
    return BeamCache(KVCache(*(over_users(*pair, new.slot_BxQ) for pair in pools)), new.paths)


def with_filler(new: NewTokens, per_user: int) -> NewTokens:
    """The same with `per_user` places for each user; what fills the added ones goes nowhere."""
    added = per_user - new.slot_BxQ.shape[1]
    wider = ((0, 0), (0, 0), (0, added), (0, 0), (0, 0))
    return NewTokens(
        KVCache(*(jnp.pad(values, wider) for values in new.kv)),
        jnp.pad(new.slot_BxQ, ((0, 0), (0, added)), constant_values=jnp.iinfo(jnp.int32).max),
        new.paths,
    )


def take_beams(cache: BeamCache, beam_BxM: jax.Array) -> BeamCache:
    """The cache with the beams of each user chosen anew (int32, some perhaps twice)."""
    paths = cache.paths._replace(
        seen_BxMxP=jnp.take_along_axis(cache.paths.seen_BxMxP, beam_BxM[:, :, None], axis=1),
        length_BxM=jnp.take_along_axis(cache.paths.length_BxM, beam_BxM, axis=1),
    )
    return cache._replace(paths=paths)


def with_room(cache: BeamCache, slots: int) -> BeamCache:
    """The cache with its pools enlarged to `slots`."""

    def pad(array, axis):
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, slots - array.shape[axis])
        return jnp.pad(array, widths)

    paths = cache.paths._replace(
        place_BxP=pad(cache.paths.place_BxP, 1), seen_BxMxP=pad(cache.paths.seen_BxMxP, 2)
    )
    return BeamCache(jax.tree.map(lambda values: pad(values, 2), cache.kv), paths)


class Packing(NamedTuple):
    """The new tokens [B, M, E] of a call: [T] as the layers run them, by user as they attend.

    Attributes:
      pack: [B, M, E, ...] -> [T, ...], the tokens that run; [B, Q, ...] if all of them do.
      by_user: [T, ...] -> [B, Q, ...], the tokens that run of each user, then filler.
      back: [B, Q, ...] -> [T, ...].
      beam_BxQ: int32, the beam that reads a token; -1 for filler.
      place_BxQ: int32, a token's place in [0, E) on its beam's edge.
    """

    pack: Callable[[jax.Array], jax.Array]
    by_user: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]
    beam_BxQ: jax.Array
    place_BxQ: jax.Array


def pack(x_BxMxE: jax.Array, kept_T: jax.Array) -> jax.Array:
    """[B, M, E, ...] -> [T, ...]: the tokens with these indices into B * M * E."""
    return x_BxMxE.reshape(-1, *x_BxMxE.shape[3:]).at[kept_T].get(mode="clip")


def packing(shape: tuple[int, int, int], kept_T: jax.Array | None, per_user: int) -> Packing:
    """How tokens of shape [B, M, E] are packed.

    kept_T: int32, indices into B * M * E of the tokens that run, ascending, at most `per_user` (Q)
    of each user; those past the end are padding. None: all tokens run.
    """
    batch, beams, edge = shape
    of_user = beams * edge

    def beams_and_places(index):
        return index // edge % beams, index % edge

    if kept_T is None:
        beam, place = (
            jnp.broadcast_to(x[None, :], (batch, of_user))
            for x in beams_and_places(jnp.arange(of_user))
        )
        return Packing(
            lambda x: x.reshape(batch, of_user, *x.shape[3:]),
            lambda x: x, lambda x: x, beam, place,
        )  # fmt: skip
    user_T = kept_T // of_user
    rank_T = jnp.arange(kept_T.shape[0]) - jnp.searchsorted(kept_T, user_T * of_user)
    place_T = user_T * per_user + rank_T
    count = kept_T.shape[0]
    index = jnp.full(batch * per_user, count).at[place_T].set(jnp.arange(count), mode="drop")

    def by_user(x):
        return x.at[index].get(mode="clip").reshape(batch, per_user, *x.shape[1:])

    beam_BxQ, place_BxQ = beams_and_places(by_user(kept_T))
    return Packing(
        lambda x: pack(x, kept_T),
        by_user,
        lambda x: x.reshape(-1, *x.shape[2:]).at[place_T].get(mode="clip"),
        jnp.where(index.reshape(batch, per_user) < count, beam_BxQ, -1),
        place_BxQ,
    )
