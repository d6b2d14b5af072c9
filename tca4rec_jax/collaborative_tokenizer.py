"""Collaborative Tokenizer: CF logits of items -> next-token distributions of title prefixes.

TCA4Rec, section "Collaborative Tokenizer": with M(n) the sum of exp(s / beta) over the items below
trie node n, p_cf(v | h) = M(child(h, v)) / M(h).  Everything here is float32 and in log space, each
segment relative to its own maximum, so that unlikely corners of the catalogue stay exact.

Axis letters: P (row, target) pairs, I items, Q leaves, N trie nodes, K decisions, C children.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.trie import ItemTrie


class TrieArrays(NamedTuple):
    """What the projection needs of a (compressed) trie, as device arrays; see ItemTrie."""

    leaf_of_item: jax.Array  # int32 [I]
    leaf: jax.Array  # int32 [N]
    parent: jax.Array  # int32 [N]
    child_start: jax.Array  # int32 [N]
    child_count: jax.Array  # int32 [N]
    token: jax.Array  # int32 [N]


class TrieShape(NamedTuple):
    """The static sizes that go with TrieArrays (hashable: a static argument of jit)."""

    num_leaves: int
    max_children: int
    level_offsets: tuple[int, ...]


def trie_on_device(trie: ItemTrie) -> tuple[TrieArrays, TrieShape]:
    """Device arrays and static sizes of a trie; pass `trie.compress()` unless you have a reason."""
    arrays = TrieArrays(*(jnp.asarray(getattr(trie, name)) for name in TrieArrays._fields))
    offsets = tuple(int(offset) for offset in trie.level_offsets)
    return arrays, TrieShape(trie.num_leaves, trie.max_children, offsets)


def segment_logsumexp(values: jax.Array, segment_ids: jax.Array, num_segments: int) -> jax.Array:
    """log sum exp over segments of the leading axis; -inf for an empty segment."""
    highest = jax.ops.segment_max(values, segment_ids, num_segments, indices_are_sorted=True)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0.0))
    shifted = jnp.exp(values - highest[segment_ids])
    total = jax.ops.segment_sum(shifted, segment_ids, num_segments, indices_are_sorted=True)
    return jnp.log(total) + highest


def node_log_mass(
    logits_PxI: jax.Array, trie: TrieArrays, shape: TrieShape, beta: jax.Array | float = 1.0
) -> jax.Array:
    """log M(n) for every trie node.

    Args:
      logits_PxI: CF logits, any float dtype (computed in float32).
      trie, shape: from `trie_on_device`.
      beta: CF temperature, > 0.

    Returns:
      float32 [P, N]; p_cf(child | h) = exp(mass[child] - mass[h]).
    """
    scores_IxP = logits_PxI.astype(jnp.float32).T / beta
    order = jnp.argsort(trie.leaf_of_item, stable=True)
    leaf_mass_QxP = segment_logsumexp(scores_IxP[order], trie.leaf_of_item[order], shape.num_leaves)
    below = None
    levels = []
    ranges = list(zip(shape.level_offsets[:-1], shape.level_offsets[1:], strict=True))
    for start, stop in reversed(ranges):
        leaf = trie.leaf[start:stop]
        mass = leaf_mass_QxP[jnp.maximum(leaf, 0)]
        if below is not None:
            parents = trie.parent[stop : stop + below.shape[0]] - start
            inner = segment_logsumexp(below, parents, stop - start)
            mass = jnp.where(leaf[:, None] >= 0, mass, inner)
        below = mass
        levels.append(mass)
    return jnp.concatenate(levels[::-1]).T


def children_of(node_K: jax.Array, trie: TrieArrays, shape: TrieShape):
    """The children of the given nodes.

    Returns:
      (child_KxC int32 node ids, 0 where there is none; valid_KxC bool).
    """
    offset_C = jnp.arange(shape.max_children, dtype=jnp.int32)
    valid_KxC = offset_C[None, :] < trie.child_count[node_K][:, None]
    child_KxC = trie.child_start[node_K][:, None] + offset_C[None, :]
    return jnp.where(valid_KxC, child_KxC, 0), valid_KxC


def child_log_probs(
    mass_PxN: jax.Array, pair_K: jax.Array, node_K: jax.Array, trie: TrieArrays, shape: TrieShape
):
    """Next-token distributions of K prefixes (decisions), sparse over the node's children.

    Args:
      mass_PxN: float32, from `node_log_mass`.
      pair_K: int32, the (row, target) pair whose CF logits apply.
      node_K: int32, the trie node of the prefix.

    Returns:
      (tokens_KxC int32, log_p_KxC float32): children's tokens and log p_cf, -inf where there is
      none.
    """
    child_KxC, valid_KxC = children_of(node_K, trie, shape)
    log_p_KxC = mass_PxN[pair_K[:, None], child_KxC] - mass_PxN[pair_K, node_K][:, None]
    return trie.token[child_KxC], jnp.where(valid_KxC, log_p_KxC, -jnp.inf)


def token_distributions(logits_PxI: jax.Array, trie: ItemTrie, vocab_size: int, beta: float = 1.0):
    """Dense view for inspection: p_cf of every inner node of the compressed trie.

    Returns:
      (nodes int32 [K], probabilities float32 [P, K, V]): the decisions and their distributions.
    """
    compressed = trie.compress()
    arrays, shape = trie_on_device(compressed)
    mass_PxN = node_log_mass(logits_PxI, arrays, shape, beta)
    node_K = jnp.flatnonzero(arrays.child_count > 0).astype(jnp.int32)

    def one_row(mass_N):
        pair_K = jnp.zeros_like(node_K)
        tokens_KxC, log_p_KxC = child_log_probs(mass_N[None, :], pair_K, node_K, arrays, shape)
        dense_KxV = jnp.zeros((node_K.size, vocab_size))
        return dense_KxV.at[jnp.arange(node_K.size)[:, None], tokens_KxC].add(jnp.exp(log_p_KxC))

    return node_K, jax.vmap(one_row)(mass_PxN)
