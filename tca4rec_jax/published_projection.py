"""The projection as the published code rounds it (objective.cf_dtype=bfloat16; docs/official.md).

Axes: core/__init__.py; P are all pairs of a batch and K all its decisions.
"""

import jax
import jax.numpy as jnp

from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.core.trie import DeviceTrie


def project_rounded(
    cf_PxD: jax.Array,
    items: CFItems,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: DeviceTrie,
    beta: jax.Array | float = 1.0,
) -> jax.Array:
    """`project` as the published code computes it, in bfloat16 and item by item, in their order.

    The trie's items are not sharded. A node's children's probabilities do not add up to 1: the
    small ones of many items are lost in a sum.
    """
    vectors, items = jax.tree.map(_rounded, (cf_PxD, items))
    logits_PxI = _rounded(cf_logits(vectors, items))
    leaf_I = jnp.zeros_like(trie.ordered_leaf).at[trie.item_order].set(trie.ordered_leaf)
    start_Kx1, stop_Kx1 = trie.leaf_start[node_K][:, None], trie.leaf_stop[node_K][:, None]
    below_KxI = (leaf_I[None, :] >= start_Kx1) & (leaf_I[None, :] < stop_Kx1)
    score_KxI = jnp.where(below_KxI, _rounded(logits_PxI / beta)[pair_K], -jnp.inf)
    q_KxI = _rounded(jax.nn.softmax(score_KxI, axis=1))
    child_KxC, is_child_KxC = trie.children(node_K)
    stop_KxC = jnp.where(is_child_KxC, trie.leaf_stop[child_KxC], trie.sizes.num_leaves)
    place_KxI = jax.vmap(lambda stop_C: jnp.searchsorted(stop_C, leaf_I, side="right"))(stop_KxC)
    place_KxI = jnp.where(below_KxI, place_KxI, trie.sizes.max_children)  # of no child
    row_K = jnp.arange(node_K.size)

    def add(sum_KxC, item):
        place_K, q_K = item
        sum_K = _rounded(sum_KxC.at[row_K, place_K].get(mode="fill", fill_value=0.0) + q_K)
        return sum_KxC.at[row_K, place_K].set(sum_K, mode="drop"), None

    p_KxC, _ = jax.lax.scan(add, jnp.zeros(child_KxC.shape), (place_KxI.T, q_KxI.T))
    return jnp.where(is_child_KxC, jnp.log(p_KxC), -jnp.inf)


def _rounded(array: Array) -> jax.Array:
    """float32 values that are bfloat16's (a compiler may leave out a cast to it and back)."""
    return jax.lax.reduce_precision(jnp.asarray(array, jnp.float32), 8, 7)
