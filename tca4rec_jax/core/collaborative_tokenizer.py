"""Collaborative Tokenizer: CF logits of items -> next-token distributions of title prefixes.

TCA4Rec, section "Collaborative Tokenizer": with M(n) the sum of exp(s / beta) over the items below
trie node n, p_cf(v | h) = M(child(h, v)) / M(h).  Everything here is float32 and in log space, each
segment relative to its own maximum, so that unlikely corners of the catalogue stay exact.

A *pair* is a (row, target) pair with CF logits of its own: one per row with a single target, tens
of them with sequence supervision. A *decision* is a prefix whose trie node has several children; it
belongs to a pair. Everywhere else the next token is forced and p_cf is one-hot.

The items may be sharded over a mesh axis (`DeviceTrie.of(.., item_shards=)`, and `axis_name`
below): every device sums its own items and the sparse results are joined.

Axes: core/__init__.py; here P are all pairs of a batch and K all its decisions.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie

_PROJECTION_BYTES = 256 << 20  # bounds the temporaries of one group of pairs
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
) -> jax.Array:
    """Next-token distributions of K prefixes (decisions), sparse over the node's children.

    Args:
      mass_PxN: float32, from `node_log_mass`.
      pair_K, node_K: int32, the pair whose CF logits apply, and the trie node of the prefix.
      axis_name: the mesh axis (or axes) that shards the items (inside shard_map), if one does.

    Returns:
      float32 [K, C]: log p_cf of the node's children, -inf where there is none.
    """
    child_KxC, is_child_KxC = trie.children(node_K)
    mass_KxC = jnp.where(is_child_KxC, mass_PxN[pair_K[:, None], child_KxC], -jnp.inf)
    if axis_name is not None:
        mass_KxC = _join_shards(mass_KxC, axis_name)
    # Not minus the node's own log mass: its rounding (4e-6 at 60) would spoil the sum to 1.
    return jax.nn.log_softmax(mass_KxC, axis=1)


def _join_shards(mass: jax.Array, axis_name: str | tuple[str, ...]) -> jax.Array:
    """log of the sum over devices of exp(mass)."""
    highest = jax.lax.pmax(mass, axis_name)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)
    return jnp.log(jax.lax.psum(jnp.exp(mass - highest), axis_name)) + highest


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
    where all pairs at once would be large: neither logits [P, I] nor masses [P, N] exist then.

    Args:
      cf_PxD: user vectors [P, D], or dense logits [P, I] if items.table_IxD is None; any float.
      pair_K, node_K, axis_name: as in `child_log_probs`.
      pairs_at_once: size of a group; by default what fits a quarter of a gigabyte.

    Returns:
      float32 [K, C]: log p_cf of each node's children, -inf where there is none.
    """
    num_items, num_nodes = trie.item_order.shape[0], trie.sizes.num_nodes
    if pairs_at_once is None:
        pairs_at_once = max(1, _PROJECTION_BYTES // (4 * (3 * num_items + 3 * num_nodes)))

    def group(vectors_GxD, first):
        mass_GxN = node_log_mass(cf_logits(vectors_GxD, items), trie, beta)
        inside_K = (pair_K >= first) & (pair_K < first + vectors_GxD.shape[0])
        local_K = jnp.where(inside_K, pair_K - first, 0)
        log_p_KxC = child_log_probs(mass_GxN, local_K, node_K, trie, axis_name)
        return inside_K, log_p_KxC

    if cf_PxD.shape[0] <= pairs_at_once:
        return group(cf_PxD, 0)[1]
    groups = in_chunks(cf_PxD, pairs_at_once)
    xs = groups, pairs_at_once * jnp.arange(len(groups))

    def fill(log_p_KxC, x):
        inside_K, of_group_KxC = group(*x)
        return jnp.where(inside_K[:, None], of_group_KxC, log_p_KxC), None

    empty_KxC = jnp.full((node_K.size, trie.sizes.max_children), -jnp.inf, jnp.float32)
    return jax.lax.scan(fill, empty_KxC, xs)[0]


def project_rounded(
    cf_PxD: jax.Array,
    items: CFItems,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: DeviceTrie,
    beta: jax.Array | float = 1.0,
) -> jax.Array:
    """`project` as the published code computes it, in bfloat16 and item by item, in their order.

    The trie is token by token, its items are not sharded. A node's children's probabilities do not
    add up to 1: the small ones of many items are lost in a sum.
    """
    vectors, items = jax.tree.map(_rounded, (cf_PxD, items))
    logits_PxI = _rounded(cf_logits(vectors, items))
    at_KxI, child_KxI = _on_paths(node_K, trie)
    below_KxI = at_KxI == node_K[:, None]
    score_KxI = jnp.where(below_KxI, _rounded(logits_PxI / beta)[pair_K], -jnp.inf)
    q_KxI = _rounded(jax.nn.softmax(score_KxI, axis=1))
    place_KxI = child_KxI - trie.child_start[node_K][:, None]
    place_KxI = jnp.where(below_KxI, place_KxI, trie.sizes.max_children)  # of no child
    row_K = jnp.arange(node_K.size)

    def add(sum_KxC, item):
        place_K, q_K = item
        sum_K = _rounded(sum_KxC.at[row_K, place_K].get(mode="fill", fill_value=0.0) + q_K)
        return sum_KxC.at[row_K, place_K].set(sum_K, mode="drop"), None

    zeros_KxC = jnp.zeros((node_K.size, trie.sizes.max_children))
    p_KxC, _ = jax.lax.scan(add, zeros_KxC, (place_KxI.T, q_KxI.T))
    return jnp.where(trie.children(node_K)[1], jnp.log(p_KxC), -jnp.inf)


def _rounded(array: Array) -> jax.Array:
    """float32 values that are bfloat16's (a compiler may leave out a cast to it and back)."""
    return jax.lax.reduce_precision(jnp.asarray(array, jnp.float32), 8, 7)


def _on_paths(node_K: jax.Array, trie: DeviceTrie) -> tuple[jax.Array, jax.Array]:
    """int32 [K, I] of a trie token by token: the node of every item's title at the depth of each
    node, and the one after it; 0 where the title is shorter."""
    sizes, nothing = trie.sizes, trie.sizes.num_leaves
    leaf_N = jnp.where(trie.leaf < 0, nothing, trie.leaf)
    node_Q = jnp.zeros(nothing + 1, jnp.int32).at[leaf_N].set(jnp.arange(sizes.num_nodes))
    node_I = jnp.zeros_like(trie.ordered_leaf).at[trie.item_order].set(node_Q[trie.ordered_leaf])
    levels, item_I = len(sizes.level_offsets) - 1, jnp.arange(node_I.size)

    def up(_, carry):
        path_LxI, node_I = carry
        path_LxI = path_LxI.at[trie.depth[node_I], item_I].set(node_I)
        return path_LxI, jnp.maximum(trie.parent[node_I], 0)

    paths = jnp.zeros((levels + 1, node_I.size), jnp.int32), node_I
    path_LxI, _ = jax.lax.fori_loop(0, levels, up, paths)
    depth_K = trie.depth[node_K]
    return path_LxI[depth_K], path_LxI[depth_K + 1]


def in_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] -> [chunks, chunk, ...], padded with zeros."""
    chunks = -(-array.shape[0] // chunk)
    widths = [(0, chunks * chunk - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(chunks, chunk, *array.shape[1:])


def token_distributions(
    logits_BxI: jax.Array, trie: ItemTrie, target_B: np.ndarray, vocab_size: int, beta: float = 1.0
) -> jax.Array:
    """Dense view for inspection: p_cf at every token of each row's target title.

    Args:
      logits_BxI: CF logits.
      trie: token by token, from `ItemTrie.build`.
      target_B: int, each row's target item.
      vocab_size: V, above every token of the trie.

    Returns:
      float32 [B, T, V], T the tokens of the longest of these titles, the end token included:
      [b, t] is p_cf(. | first t tokens of the title of target_B[b]), zero after its end.
    """
    leaf_B = trie.leaf_of_item[target_B]
    length_B = trie.lengths_Q[leaf_B]
    # Token by token, the node of a prefix of t tokens is that of level t.
    node_BxT = trie.paths_QxK[leaf_B, : length_B.max()]
    inside_BxT = np.arange(node_BxT.shape[1]) < length_B[:, None]
    row_K, place_K = np.nonzero(inside_BxT)
    node_K, on_device = jnp.asarray(node_BxT[row_K, place_K]), DeviceTrie.of(trie)
    log_p_KxC = jax.jit(project)(logits_BxI, DENSE, row_K, node_K, on_device, beta)
    token_KxC = on_device.token[on_device.children(node_K)[0]]
    p_BxTxV = jnp.zeros((*node_BxT.shape, vocab_size))
    return p_BxTxV.at[row_K[:, None], place_K[:, None], token_KxC].add(jnp.exp(log_p_KxC))
