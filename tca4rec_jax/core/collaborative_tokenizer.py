"""Collaborative Tokenizer: CF logits of items -> next-token distributions of title prefixes.

TCA4Rec, section "Collaborative Tokenizer": with M(n) the sum of exp(s / beta) over the items below
trie node n, p_cf(v | h) = M(child(h, v)) / M(h).  Everything here is float32 and in log space, each
segment relative to its own maximum, so that unlikely corners of the catalogue stay exact.

A *pair* is a (row, target) pair with CF logits of its own: one per row with a single target, tens
of them with sequence supervision. A *decision* is a prefix whose trie node has several children; it
belongs to a pair. Everywhere else the next token is forced and p_cf is one-hot.

The items may be sharded over a mesh axis (`shard_items`, and `axis_name` below): every device sums
its own items and the sparse results are joined.

Axis letters: P pairs, B rows with one target each, I items, Q leaves, N trie nodes, K decisions,
C children, T title tokens, V vocabulary, U tokens that some decision chooses from, D CF width.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.cf.scoring import cf_logits
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged

_PROJECTION_BYTES = 256 << 20  # bounds the temporaries of one group of pairs


class TrieArrays(NamedTuple):
    """What the projection needs of a (compressed) trie, as device arrays; see ItemTrie."""

    item_order: jax.Array  # int32 [I], the items in the order of their leaves
    ordered_leaf: jax.Array  # int32 [I], their leaves, ascending; Q and above: no item
    leaf: jax.Array  # int32 [N]
    parent: jax.Array  # int32 [N]
    child_start: jax.Array  # int32 [N]
    child_count: jax.Array  # int32 [N]
    token: jax.Array  # int32 [N]
    choice: jax.Array  # int32 [U], ascending: every token that is a child of some decision
    choice_index: jax.Array  # int32 [N], where a decision's child has its token in `choice`


class TrieShape(NamedTuple):
    """The static sizes that go with TrieArrays (hashable: a static argument of jit)."""

    num_leaves: int
    max_children: int
    level_offsets: tuple[int, ...]


class CFItems(NamedTuple):
    """The item side of factorised CF logits, user vector . item row + bias; None for dense ones."""

    table_IxD: jax.Array | None = None
    bias_I: jax.Array | None = None


DENSE = CFItems()  # the CF input is the item logits themselves


@dataclass(frozen=True, eq=False)
class TitleDecisions:
    """The decisions on the path of each item's title (host side, rows are items).

    Attributes:
      offset: int32, index of the decided token within the title.
      node: int32, node of the compressed trie.
      child: int32, which of the node's children is on the title's path.
    """

    offset: Ragged
    node: Ragged
    child: Ragged

    def pad(self, items_B: np.ndarray) -> "PaddedDecisions":
        """Those of the given items, padded to the most decisions of any title: one shape."""
        width = max(int(self.offset.lengths.max()), 1)
        inside_BxK = np.arange(width) < self.offset.lengths[items_B][:, None]
        fields = (field.pad(items_B, width, 0) for field in (self.offset, self.node, self.child))
        return PaddedDecisions(*fields, inside_BxK.astype(np.float32))


class PaddedDecisions(NamedTuple):
    """TitleDecisions of a batch of titles; padding has weight 0."""

    offset_BxK: np.ndarray  # int32
    node_BxK: np.ndarray  # int32
    child_BxK: np.ndarray  # int32
    weight_BxK: np.ndarray  # float32


def title_decisions(compressed: ItemTrie) -> TitleDecisions:
    """The decisions of every item of the catalogue, from the compressed trie."""
    path_IxK = compressed.paths_QxK[compressed.leaf_of_item]
    next_IxK = np.concatenate([path_IxK[:, 1:], np.full_like(path_IxK[:, :1], -1)], axis=1)
    decided = (path_IxK >= 0) & (compressed.child_count[path_IxK] > 1)
    node, child = path_IxK[decided], next_IxK[decided]
    counts = decided.sum(axis=1)
    return TitleDecisions(
        Ragged.from_lengths(compressed.depth[node], counts),
        Ragged.from_lengths(node, counts),
        Ragged.from_lengths((child - compressed.child_start[node]).astype(np.int32), counts),
    )


def trie_on_device(trie: ItemTrie) -> tuple[TrieArrays, TrieShape]:
    """Device arrays and static sizes of a trie; pass `trie.compress()` unless you have a reason."""
    arrays, shape = _host_arrays(trie)
    return TrieArrays(*map(jnp.asarray, arrays)), shape


def shard_items(trie: ItemTrie, num_shards: int) -> tuple[TrieArrays, TrieShape]:
    """`trie_on_device` for CF logits whose item axis is sharded into `num_shards` equal slices.

    `item_order` and `ordered_leaf` hold the shards one after the other: shard them over the mesh
    axis of the logits and replicate the rest. The catalogue is padded to a multiple of num_shards;
    pad the logits alike, with any finite value.
    """
    arrays, shape = _host_arrays(trie)
    size = -(-trie.num_items // num_shards)
    leaf_SxI = np.full(num_shards * size, trie.num_leaves, np.int32)
    leaf_SxI[: trie.num_items] = trie.leaf_of_item
    leaf_SxI = leaf_SxI.reshape(num_shards, size)
    order_SxI = np.argsort(leaf_SxI, axis=1, kind="stable").astype(np.int32)
    arrays = arrays._replace(
        item_order=order_SxI.ravel(),
        ordered_leaf=np.take_along_axis(leaf_SxI, order_SxI, axis=1).ravel(),
    )
    return TrieArrays(*map(jnp.asarray, arrays)), shape


def _host_arrays(trie: ItemTrie) -> tuple[TrieArrays, TrieShape]:
    items_I, _ = trie.items_by_leaf
    decided_N = (trie.parent >= 0) & (trie.child_count[trie.parent] > 1)
    choice_U = np.unique(trie.token[decided_N])
    if not choice_U.size:  # a single title: nothing is ever decided
        choice_U = np.zeros(1, np.int32)
    index_N = np.minimum(np.searchsorted(choice_U, trie.token), choice_U.size - 1)
    arrays = TrieArrays(
        item_order=items_I,
        ordered_leaf=trie.leaf_of_item[items_I],
        leaf=trie.leaf,
        parent=trie.parent,
        child_start=trie.child_start,
        child_count=trie.child_count,
        token=trie.token,
        choice=choice_U,
        choice_index=index_N.astype(np.int32),
    )
    offsets = tuple(int(offset) for offset in trie.level_offsets)
    return arrays, TrieShape(trie.num_leaves, trie.max_children, offsets)


def item_logits(cf_PxD: jax.Array, items: CFItems) -> jax.Array:
    """float32 item logits [P, I] from user vectors, or the stored logits themselves."""
    if items.table_IxD is None:
        return cf_PxD.astype(jnp.float32)
    return cf_logits(cf_PxD, items.table_IxD, items.bias_I)


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
    logits_PxI: jax.Array, trie: TrieArrays, shape: TrieShape, beta: jax.Array | float = 1.0
) -> jax.Array:
    """log M(n) for every trie node, over the items that are here (all of them, or one shard's).

    Args:
      logits_PxI: CF logits, any float dtype (computed in float32).
      trie, shape: from `trie_on_device`.
      beta: CF temperature, > 0.

    Returns:
      float32 [P, N], -inf for a node without items; p_cf(child | h) = exp(mass[child] - mass[h]).
    """
    scores_IxP = logits_PxI.T[trie.item_order].astype(jnp.float32) / beta
    leaf_mass_QxP = segment_logsumexp(scores_IxP, trie.ordered_leaf, shape.num_leaves)
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
    mass_PxN: jax.Array,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: TrieArrays,
    shape: TrieShape,
    axis_name: str | tuple[str, ...] | None = None,
):
    """Next-token distributions of K prefixes (decisions), sparse over the node's children.

    Args:
      mass_PxN: float32, from `node_log_mass`.
      pair_K: int32, the pair whose CF logits apply.
      node_K: int32, the trie node of the prefix.
      axis_name: the mesh axis (or axes) that shards the items (inside shard_map), if one does.

    Returns:
      (tokens_KxC int32, log_p_KxC float32): children's tokens and log p_cf, -inf where there is
      none.
    """
    child_KxC, valid_KxC = children_of(node_K, trie, shape)
    mass_KxC = jnp.where(valid_KxC, mass_PxN[pair_K[:, None], child_KxC], -jnp.inf)
    if axis_name is not None:
        mass_KxC = _join_shards(mass_KxC, axis_name)
    # Not minus the node's own log mass: its rounding (4e-6 at 60) would spoil the sum to 1.
    return trie.token[child_KxC], jax.nn.log_softmax(mass_KxC, axis=1)


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
    trie: TrieArrays,
    shape: TrieShape,
    beta: jax.Array | float = 1.0,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    pairs_at_once: int | None = None,
):
    """From CF vectors or logits straight to the distributions of K decisions.

    What `node_log_mass` and `child_log_probs` do together, for groups of pairs one after the other
    where all pairs at once would be large: neither logits [P, I] nor masses [P, N] exist then.

    Args:
      cf_PxD: user vectors [P, D], or dense logits [P, I] if items.table_IxD is None; any float.
      items: the item table (and bias) of factorised logits.
      pair_K, node_K: int32, the pair and the trie node of each decision.
      axis_name: the mesh axis (or axes) that shards the items (inside shard_map), if one does.
      pairs_at_once: size of a group; by default what fits a quarter of a gigabyte.

    Returns:
      (child_KxC int32 node ids, log_p_KxC float32): 0 and -inf where there is no child.
    """
    pairs = cf_PxD.shape[0]
    num_items, num_nodes = trie.item_order.shape[0], shape.level_offsets[-1]
    if pairs_at_once is None:
        pairs_at_once = max(1, _PROJECTION_BYTES // (4 * (3 * num_items + 3 * num_nodes)))
    child_KxC, _ = children_of(node_K, trie, shape)

    def group(vectors_GxD, first):
        mass_GxN = node_log_mass(item_logits(vectors_GxD, items), trie, shape, beta)
        inside_K = (pair_K >= first) & (pair_K < first + vectors_GxD.shape[0])
        local_K = jnp.where(inside_K, pair_K - first, 0)
        _, log_p_KxC = child_log_probs(mass_GxN, local_K, node_K, trie, shape, axis_name)
        return inside_K, log_p_KxC

    if pairs <= pairs_at_once:
        return child_KxC, group(cf_PxD, 0)[1]
    groups = -(-pairs // pairs_at_once)
    padded = jnp.pad(cf_PxD, ((0, groups * pairs_at_once - pairs), (0, 0)))
    xs = padded.reshape(groups, pairs_at_once, -1), pairs_at_once * jnp.arange(groups)

    def fill(log_p_KxC, x):
        inside_K, of_group_KxC = group(*x)
        return jnp.where(inside_K[:, None], of_group_KxC, log_p_KxC), None

    empty_KxC = jnp.full(child_KxC.shape, -jnp.inf, jnp.float32)
    return child_KxC, jax.lax.scan(fill, empty_KxC, xs)[0]


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
      [b, t] is p_cf(. | first t tokens of the title of target_B[b]), zero behind its end.
    """
    arrays, shape = trie_on_device(trie)
    leaf_B = trie.leaf_of_item[target_B]
    length_B = trie.lengths_Q[leaf_B]
    # Token by token, the node of a prefix of t tokens is that of level t.
    node_BxT = trie.paths_QxK[leaf_B, : length_B.max()]
    inside_BxT = np.arange(node_BxT.shape[1]) < length_B[:, None]
    node_BxT = np.where(inside_BxT, node_BxT, 0)
    return _dense_view(
        logits_BxI, node_BxT, inside_BxT, arrays, beta, shape=shape, vocab_size=vocab_size
    )


@partial(jax.jit, static_argnames=("shape", "vocab_size"))
def _dense_view(logits_BxI, node_BxT, inside_BxT, trie, beta, *, shape, vocab_size):
    mass_BxN = node_log_mass(logits_BxI, trie, shape, beta)

    def one_row(mass_N, node_T, inside_T):
        row_T = jnp.zeros_like(node_T)
        tokens_TxC, log_p_TxC = child_log_probs(mass_N[None, :], row_T, node_T, trie, shape)
        p_TxC = jnp.where(inside_T[:, None], jnp.exp(log_p_TxC), 0.0)
        dense_TxV = jnp.zeros((node_T.size, vocab_size))
        return dense_TxV.at[jnp.arange(node_T.size)[:, None], tokens_TxC].add(p_TxC)

    return jax.vmap(one_row)(mass_BxN, node_BxT, inside_BxT)
