"""Collaborative Tokenizer: CF logits of items -> next-token distributions of title prefixes.

TCA4Rec, section "Collaborative Tokenizer": with M(n) the sum of exp(s / beta) over the items below
trie node n, p_cf(v | h) = M(child(h, v)) / M(h).  Everything here is float32 and in log space, each
segment relative to its own maximum, so that unlikely corners of the catalogue stay exact.

A *pair* is a (row, target) pair with CF logits of its own: one per row with a single target, tens
of them with sequence supervision. A decision (core/decisions.py) belongs to a pair.

The items may be sharded over a mesh axis (`DeviceTrie.of(.., item_shards=)`, and `axis_name`
below): every device sums its own items and the sparse results are joined.

Axes: core/__init__.py; here P are all pairs of a batch and K all its decisions.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.batching import in_chunks
from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import DeviceTrie

# The temporaries of one group of pairs: what a CPU's cache holds, elsewhere what saves launches.
_GROUP_BYTES = {"cpu": 32 << 20, "default": 256 << 20}
_LARGEST_SCORE = 1e30  # of an item's |logit| / beta; sums and differences of such stay finite


class CFItems(NamedTuple):
    """The item side of factorised CF logits, user vector . item row + bias; None for dense ones."""

    table_IxD: Array | None = None
    bias_I: Array | None = None


DENSE = CFItems()  # the CF input is the item logits themselves


def cf_logits(cf_PxD: jax.Array, items: CFItems) -> jax.Array:
    """float32 CF logits of every item [P, I], from user vectors or the logits themselves.

    In float32 whatever the accelerator's default matmul precision is: they become probabilities.
    """
    if items.table_IxD is None:
        return cf_PxD.astype(jnp.float32)
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    logits_PxI = jnp.einsum("pd,id->pi", cf_PxD, items.table_IxD, **exact)
    return logits_PxI if items.bias_I is None else logits_PxI + items.bias_I[None, :]


def segment_logsumexp(values: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
    """log sum exp over segments of the leading axis; -inf for an empty segment.

    Segment ids are ascending; entries whose id is num_segments or more belong to none.
    """
    highest = jax.ops.segment_max(values, segment_ids, num_segments, indices_are_sorted=True)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
    shifted = jnp.exp(values - highest.at[segment_ids].get(mode="clip"))
    # Multiples of 2**-12 add up without rounding (to 4096), and the rest is too small for its
    # rounding to matter: a plain float32 sum over 100 thousand items would be off by 1e-5 and more.
    coarse = jnp.round(shifted * 4096) / 4096
    parts = (
        jax.ops.segment_sum(part, segment_ids, num_segments, indices_are_sorted=True)
        for part in (coarse, shifted - coarse)
    )
    return jnp.log(sum(parts)) + highest


def node_log_mass(
    logits_PxI: jax.Array, trie: DeviceTrie, beta: jax.Array | float = 1.0
) -> jax.Array:
    """log M(n) for every trie node, over the items that are here (all of them, or one shard's).

    The CF logits are of any float dtype (computed in float32), beta is their temperature, > 0. An
    item is left out by -inf alone, not by a finite logit whose quotient overflows.

    Returns:
      float32 [P, N], -inf for a node without items; p_cf(child | h) = exp(mass[child] - mass[h]).
    """
    logits_IxP = logits_PxI.T[trie.item_order].astype(jnp.float32)
    scores_IxP = jnp.clip(logits_IxP / beta, -_LARGEST_SCORE, _LARGEST_SCORE)
    scores_IxP = jnp.where(logits_IxP > -jnp.inf, scores_IxP, -jnp.inf)
    leaf_mass_QxP = segment_logsumexp(scores_IxP, trie.ordered_leaf, trie.sizes.num_leaves)
    below, levels = None, []
    for start, stop in reversed([*itertools.pairwise(trie.sizes.level_offsets)]):
        leaf = trie.leaf[start:stop]
        mass = leaf_mass_QxP[jnp.maximum(leaf, 0)]
        if below is not None:
            parents = trie.parent[stop : stop + below.shape[0]] - start
            inner = segment_logsumexp(below, parents, stop - start)
            mass = jnp.where(leaf[:, None] >= 0, mass, inner)
        below = mass
        levels.append(mass)
    return jnp.concatenate(levels[::-1]).T


def child_log_probs(
    mass_PxN: jax.Array,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: DeviceTrie,
    axis_name: str | tuple[str, ...] | None = None,
    *,
    children: int | None = None,
) -> jax.Array:
    """Next-token distributions of K prefixes (decisions), sparse over the node's children.

    Args:
      mass_PxN: float32, from `node_log_mass`.
      pair_K, node_K: int32, the pair whose CF logits apply, and the trie node of the prefix.
      axis_name: the mesh axis (or axes) that shards the items (inside shard_map), if one does.
      children: C, at least the most children of these nodes; by default of all nodes.

    Returns:
      float32 [K, C]: log p_cf of the node's children, -inf where there is none.
    """
    return _shares(_child_mass(mass_PxN, pair_K, node_K, trie, children), axis_name)


def _child_mass(mass_PxN, pair_K, node_K, trie: DeviceTrie, children=None) -> jax.Array:
    child_KxC, is_child_KxC = trie.children(node_K, children)
    return jnp.where(is_child_KxC, mass_PxN[pair_K[:, None], child_KxC], -jnp.inf)


def _shares(mass_KxC: jax.Array, axis_name: str | tuple[str, ...] | None) -> jax.Array:
    """log of each child's share of the masses, which are sums over the devices if an axis says."""
    if axis_name is not None:
        highest = jax.lax.pmax(mass_KxC, axis_name)
        highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
        mass_KxC = jnp.log(jax.lax.psum(jnp.exp(mass_KxC - highest), axis_name)) + highest
    # Not minus the node's own log mass: its rounding (4e-6 at 60) would spoil the sum to 1.
    return jax.nn.log_softmax(mass_KxC, axis=1)


def project(
    cf_PxD: jax.Array,
    items: CFItems,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: DeviceTrie,
    beta: jax.Array | float = 1.0,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    pairs_at_once: int | None = None,
) -> jax.Array:
    """From CF vectors or logits straight to the distributions of K decisions.

    What `node_log_mass` and `child_log_probs` do together, for groups of pairs one after the other
    where all pairs at once would be large: neither logits [P, I] nor masses [P, N] exist then, and
    pairs without a decision (the padding of rows) are left out.

    Args:
      cf_PxD: user vectors [P, D], or dense logits [P, I] if items.table_IxD is None; any float.
      pair_K, node_K, axis_name: as in `child_log_probs`.
      pairs_at_once: size of a group; by default what fits 32 MiB on a CPU, elsewhere 256 MiB.

    Returns:
      float32 [K, C]: log p_cf of each node's children, -inf where there is none.
    """
    if pairs_at_once is None:
        pair_bytes = 4 * 3 * (trie.item_order.shape[0] + trie.sizes.num_nodes)
        of = partial(project, axis_name=axis_name)
        size_of = {platform: max(1, size // pair_bytes) for platform, size in _GROUP_BYTES.items()}
        sized = {platform: partial(of, pairs_at_once=size) for platform, size in size_of.items()}
        args = cf_PxD, items, pair_K, node_K, trie, jnp.asarray(beta, jnp.float32)
        return jax.lax.platform_dependent(*args, **sized)

    def group(vectors_GxD, local_K):
        mass_GxN = node_log_mass(cf_logits(vectors_GxD, items), trie, beta)
        return _child_mass(mass_GxN, local_K, node_K, trie)

    if cf_PxD.shape[0] <= pairs_at_once:
        return _shares(group(cf_PxD, pair_K), axis_name)
    decides_P = jnp.zeros(cf_PxD.shape[0], bool).at[pair_K].set(True)
    order_P = jnp.argsort(~decides_P)  # pairs with decisions first
    group_K, local_K = jnp.divmod(jnp.argsort(order_P)[pair_K], pairs_at_once)
    vectors = in_chunks(cf_PxD[order_P], pairs_at_once)

    def fill(g, mass_KxC):
        def filled():
            is_here_K = group_K == g
            of_group_KxC = group(vectors[g], jnp.where(is_here_K, local_K, 0))
            return jnp.where(is_here_K[:, None], of_group_KxC, mass_KxC)

        return jax.lax.cond(g <= jnp.max(group_K), filled, lambda: mass_KxC)

    empty_KxC = jnp.full((node_K.size, trie.sizes.max_children), -jnp.inf, jnp.float32)
    return _shares(jax.lax.fori_loop(0, len(vectors), fill, empty_KxC), axis_name)
