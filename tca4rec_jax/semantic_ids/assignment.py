"""Codes for items so that codes are used evenly: Sinkhorn's plan, and an assignment of even sizes.

Axis letters: n items, K codes.
"""

import jax
import jax.numpy as jnp

from tca4rec_jax.core.collaborative_tokenizer import segment_logsumexp

LAST_LEVEL_EPSILON, LAST_LEVEL_ROUNDS = 0.003, 50
"""Of Sinkhorn's plan for a last level, as LC-Rec has them."""
_EVEN_EPSILON, _EVEN_ROUNDS = 0.03, 50


def sinkhorn(
    cost_nxK: jax.Array,
    group_n: jax.Array | None = None,
    num_groups: int = 1,
    *,
    epsilon: float,
    rounds: int,
) -> jax.Array:
    """log of the plan that spreads each group of items evenly over the codes at little cost.

    Cuturi 2013 in log space, with the costs of a group moved to -1..1, as LC-Rec (arXiv 2311.09049)
    does: an item's code is the largest of its row.

    Args:
      cost_nxK: float32, the costs of a code for an item.
      group_n: int32, ascending, the group of each item; num_groups and above: of none (padding). By
        default all items are one group.
      epsilon: the weight of the plan's entropy: near 0 an item has one code.
      rounds: how often rows and columns are normalised.

    Returns:
      float32 [n, K], up to a constant for each group.
    """

    def by_group(of_all, of_group, values):
        if group_n is None:
            return of_all(values, axis=0, keepdims=True)
        return of_group(values, group_n, num_groups).at[group_n].get(mode="clip")

    lowest = by_group(jnp.min, jax.ops.segment_min, cost_nxK.min(axis=1, keepdims=True))
    highest = by_group(jnp.max, jax.ops.segment_max, cost_nxK.max(axis=1, keepdims=True))
    middle, half = (lowest + highest) / 2, (highest - lowest) / 2 + 1e-5

    def spread(_, log_plan_nxK):
        log_plan_nxK -= jax.nn.logsumexp(log_plan_nxK, axis=1, keepdims=True)
        return log_plan_nxK - by_group(jax.nn.logsumexp, segment_logsumexp, log_plan_nxK)

    return jax.lax.fori_loop(0, rounds, spread, (middle - cost_nxK) / half / epsilon)


@jax.jit
def even_codes(cost_nxK: jax.Array) -> jax.Array:
    """A code for each item, int32 [n], so that every code has n // K items or one more.

    The sizes hold exactly; the sum of the costs is nearly the lowest: items choose by Sinkhorn's
    plan (by the costs if there are fewer items than codes), and where a code is chosen too often
    its most likely items stay.
    """
    num_items, num_codes = cost_nxK.shape
    if num_items >= num_codes:
        cost_nxK = -sinkhorn(cost_nxK, epsilon=_EVEN_EPSILON, rounds=_EVEN_ROUNDS)
    ordered = jax.lax.sort_key_val(cost_nxK, jax.lax.broadcasted_iota(jnp.int32, cost_nxK.shape, 1))
    code_n = _accept(*ordered, jnp.ones(num_items, bool), num_items // num_codes)
    # Now all codes are full, and as many items are left as there are codes with one more.
    return jnp.minimum(code_n, _accept(*ordered, code_n == num_codes, 1))


def _accept(
    cost_nxK: jax.Array, code_nxK: jax.Array, asks_n: jax.Array, capacity: int
) -> jax.Array:
    """Deferred acceptance (Gale and Shapley 1962): int32 [n], K for an item that no code takes.

    Every item that asks asks the first code of its row, ordered by cost, that has not refused it; a
    code refuses all but its `capacity` cheapest ones, until there is nothing to refuse.
    """
    num_items, num_codes = cost_nxK.shape
    item_n = jnp.arange(num_items)

    def ask(place_n):
        at_n = jnp.minimum(place_n, num_codes - 1)
        asked_n = jnp.where(place_n < num_codes, code_nxK[item_n, at_n], num_codes)
        return asked_n, cost_nxK[item_n, at_n]

    def refuse(state):
        place_n, _ = state
        asked_n, cost_n = ask(place_n)
        order_n = jnp.lexsort((cost_n, asked_n))
        ordered_n = asked_n[order_n]
        later_n = item_n - jnp.searchsorted(ordered_n, ordered_n) >= capacity
        refused_n = later_n & (ordered_n < num_codes)
        return place_n.at[order_n].add(refused_n), refused_n.any()

    first_n = jnp.where(asks_n, 0, num_codes)
    place_n, _ = jax.lax.while_loop(lambda state: state[1], refuse, (first_n, True))
    return ask(place_n)[0].astype(jnp.int32)
