"""What CF logits say over a whole catalogue, a block of items at a time, on the device.

Logits of all rows and items never exist at once: `fold` makes those of a block, and what is wanted
of them (a sum, the highest, a rank) is kept from block to block. Everything here is traceable.

Axis letters: B rows, I items, W items of a block, D width, M places of a list, N blocks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.metrics import ahead_of

LOGITS_AT_ONCE = 1 << 23  # of a block: 32 MB
_LOWEST = float(np.finfo(np.float32).min)


def block_width(rows: int, num_items: int) -> int:
    """How many items are in a block: W."""
    return min(max(LOGITS_AT_ONCE // rows, 1), num_items)


def fold(
    add: Callable[..., Any], state: Any, cf_BxD: jax.Array, items: CFItems, *columns: jax.Array
) -> Any:
    """The state after add(state, logits_BxW, item_W, *columns) for every block of items in turn.

    `cf` and `items` are as in `cf_logits`. `columns` are [.., I], a block gets its part [.., W].
    The last block may begin with items of the one before: their logits are then -inf.
    """
    num_items = cf_BxD.shape[1] if items.table_IxD is None else items.table_IxD.shape[0]
    width = block_width(cf_BxD.shape[0], num_items)
    if num_items == width:
        return add(state, cf_logits(cf_BxD, items), jnp.arange(num_items), *columns)

    def block(number, state):
        start = jnp.minimum(number * width, num_items - width)
        item_W = start + jnp.arange(width)

        def part(array, axis):
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis)

        of_block = jax.tree.map(lambda array: part(array, 0), items)
        logits_BxW = cf_logits(part(cf_BxD, 1) if items.table_IxD is None else cf_BxD, of_block)
        # So that `add` is not fused into the product: every fold rounds it in the same way.
        logits_BxW = jax.lax.optimization_barrier(logits_BxW)
        logits_BxW = jnp.where(item_W >= number * width, logits_BxW, -jnp.inf)
        return add(state, logits_BxW, item_W, *(part(column, -1) for column in columns))

    return jax.lax.fori_loop(0, -(-num_items // width), block, state)


class LogSum(NamedTuple):
    """log sum exp of the logits so far, float32 [B]: relative to the highest."""

    highest_B: jax.Array
    total_B: jax.Array

    @classmethod
    def nothing(cls, rows: int) -> "LogSum":
        """Of no logits yet."""
        return cls(jnp.full(rows, _LOWEST), jnp.zeros(rows))

    def add(self, logits_BxW: jax.Array) -> "LogSum":
        """With more logits; -inf adds nothing."""
        highest_B = jnp.maximum(self.highest_B, jnp.max(logits_BxW, axis=1))
        total_B = jnp.sum(jnp.exp(logits_BxW - highest_B[:, None]), axis=1)
        return LogSum(highest_B, self.total_B * jnp.exp(self.highest_B - highest_B) + total_B)

    @property
    def value_B(self) -> jax.Array:
        """log sum exp."""
        return jnp.log(self.total_B) + self.highest_B


class Entropy(NamedTuple):
    """The entropy of the softmax of the logits so far, in nats, float32 [B]."""

    log_sum: LogSum
    product_B: jax.Array  # sum of exp(z) z, z a logit less the highest

    @classmethod
    def nothing(cls, rows: int) -> "Entropy":
        """Of no logits yet."""
        return cls(LogSum.nothing(rows), jnp.zeros(rows))

    def add(self, logits_BxW: jax.Array) -> "Entropy":
        """With more logits; -inf adds nothing."""
        before, now = self.log_sum, self.log_sum.add(logits_BxW)
        lower_B = before.highest_B - now.highest_B
        product_B = jnp.exp(lower_B) * (self.product_B + lower_B * before.total_B)
        z_BxW = logits_BxW - now.highest_B[:, None]
        z_BxW = jnp.where(z_BxW > -jnp.inf, jnp.exp(z_BxW) * z_BxW, 0.0)
        return Entropy(now, product_B + jnp.sum(z_BxW, axis=1))

    @property
    def value_B(self) -> jax.Array:
        """The entropy."""
        return jnp.log(self.log_sum.total_B) - self.product_B / self.log_sum.total_B


class Highest(NamedTuple):
    """The best items so far, best first; of equal ones those that came first."""

    values_BxM: jax.Array  # float32
    items_BxM: jax.Array  # int32, -1 where only -inf is left

    @classmethod
    def nothing(cls, rows: int, places: int) -> "Highest":
        """Of no logits yet."""
        return cls(jnp.full((rows, places), -jnp.inf), jnp.full((rows, places), -1, jnp.int32))

    def add(self, logits_BxW: jax.Array, item_W: jax.Array) -> "Highest":
        """With more logits, of items that follow; -inf adds nothing."""
        places = self.values_BxM.shape[1]
        values_BxM, at_BxM = jax.lax.top_k(logits_BxW, min(places, logits_BxW.shape[1]))
        values_BxX = jnp.concatenate([self.values_BxM, values_BxM], axis=1)
        items_BxX = jnp.concatenate([self.items_BxM, item_W[at_BxM].astype(jnp.int32)], axis=1)
        values_BxM, at_BxM = jax.lax.top_k(values_BxX, places)
        return Highest(values_BxM, jnp.take_along_axis(items_BxX, at_BxM, axis=1))


def highest_of(logits_BxW: jax.Array, of_target_BxW: jax.Array, so_far_B: jax.Array) -> jax.Array:
    """The highest logit so far of the items that are marked, float32 [B]; -inf if none is."""
    here_B = jnp.max(jnp.where(of_target_BxW, logits_BxW, -jnp.inf), axis=1)
    return jnp.maximum(so_far_B, here_B)


class SharedTitles(NamedTuple):
    """The items whose title another item has too, int32, in blocks that part no title."""

    item_NxW: np.ndarray  # by their titles; -1 where there are no more
    title_NxW: np.ndarray

    @classmethod
    def of(cls, title_of_item: np.ndarray, width: int) -> "SharedTitles":
        """In blocks of `width` items (those of `fold`: see `count_ahead`), or as many as one title
        has."""
        count_Q = np.bincount(title_of_item)
        item_n = np.flatnonzero(count_Q[title_of_item] > 1)
        item_n = item_n[np.argsort(title_of_item[item_n], kind="stable")].astype(np.int32)
        ends = np.cumsum(count_Q[count_Q > 1])
        width = max(width, int(count_Q.max()))
        stops = [0]
        while stops[-1] < item_n.size:
            stops.append(ends[np.searchsorted(ends, stops[-1] + width, side="right") - 1])
        blocks = Ragged.from_lengths(item_n, np.diff(stops))
        item_NxW = blocks.pad(np.arange(len(blocks)), width, -1)
        return cls(item_NxW, np.where(item_NxW < 0, -1, title_of_item[item_NxW]).astype(np.int32))

    def others(self, num_items: int) -> jax.Array:
        """Which items share their title with none, bool [I]."""
        shared_NxW = jnp.where(self.item_NxW < 0, num_items, self.item_NxW)
        return jnp.ones(num_items, bool).at[shared_NxW].set(False, mode="drop")

    def count_ahead(
        self,
        cf_BxD: jax.Array,
        items: CFItems,
        score_B: jax.Array,
        target_B: jax.Array,
        allowed_BxI: jax.Array | None,
    ) -> jax.Array:
        """How many of these titles are ahead of the target's, which scores so, int32 [B].

        In blocks as wide as those of `fold` a logit is rounded as there, so that ties are ties.
        """

        def add(ahead_B, block):
            item_W, title_W = block
            of_block = jax.tree.map(lambda array: array[item_W], items)
            logits_BxW = cf_logits(
                cf_BxD[:, item_W] if items.table_IxD is None else cf_BxD, of_block
            )
            logits_BxW = jax.lax.optimization_barrier(logits_BxW)
            here_BxW = ahead_of(logits_BxW, title_W, score_B, target_B)
            here_BxW &= item_W[None, :] >= 0
            if allowed_BxI is not None:
                here_BxW &= allowed_BxI[:, item_W]
            number_W = jnp.cumsum(jnp.diff(title_W, prepend=title_W[:1]) != 0)
            sums = jax.ops.segment_sum(
                here_BxW.T.astype(jnp.int32), number_W, len(title_W), indices_are_sorted=True
            )
            return ahead_B + jnp.sum(sums > 0, axis=0, dtype=jnp.int32), None

        return jax.lax.scan(add, jnp.zeros_like(target_B), tuple(self))[0]
