"""The item trie in the form that beam search reads: device arrays and static sizes.

Axis letters: N trie nodes, F tokens of the longest edge into an inner node (padded).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.collaborative_tokenizer import TrieArrays, TrieShape, trie_on_device
from tca4rec_jax.trie import ItemTrie


class SearchTrie(NamedTuple):
    """Device arrays of the trie that is searched, and of the compressed trie for the guidance."""

    child_start: jax.Array  # int32 [N]
    child_count: jax.Array  # int32 [N]
    token: jax.Array  # int32 [N], first token of the edge into the node
    leaf: jax.Array  # int32 [N], -1 for inner nodes
    depth: jax.Array  # int32 [N], tokens from the root
    edge_length: jax.Array  # int32 [N]
    edge_tokens: jax.Array  # int32 [N, F]; zeros for leaves, whose edges are never run
    longest: jax.Array  # int32 [N], tokens of the longest sequence below the node
    mass_node: jax.Array  # int32 [N], the node of the compressed trie with the same leaves
    mass: TrieArrays  # the compressed trie


class SearchShape(NamedTuple):
    """The static sizes that go with a SearchTrie (hashable: a static argument of jit)."""

    root_children: int
    inner_children: int  # most children of a node other than the root
    edge_chunk: int  # tokens of an edge that one call of the LLM takes
    suffix_size: int  # most tokens the LLM ever generates for one beam
    mass: TrieShape


def search_trie(
    trie: ItemTrie, *, compress: bool, edge_chunk: int = 1
) -> tuple[SearchTrie, SearchShape]:
    """Prepares a token-by-token trie for beam search.

    Args:
      trie: from `ItemTrie.build`.
      compress: search the compressed trie, in which forced tokens need no step of their own. Only
        right where a forced token has log-probability 0 (score 'before_softmax').
      edge_chunk: tokens of an edge run by one call of the LLM; longer edges take several calls. At
        most the longest edge is used.

    Raises:
      ValueError: edge_chunk below 1.
    """
    if edge_chunk < 1:
        raise ValueError(f"edge_chunk must be at least 1, got {edge_chunk}")
    compressed = trie.compress()
    searched = compressed if compress else trie
    inner_N = searched.child_count > 0
    longest_edge = max(1, int(searched.edge_length[inner_N].max()))
    edge_chunk = min(edge_chunk, longest_edge)
    width = -(-longest_edge // edge_chunk) * edge_chunk
    edge_tokens_NxF = searched.edge_tokens(width)
    edge_tokens_NxF = np.where(inner_N[:, None] & (edge_tokens_NxF >= 0), edge_tokens_NxF, 0)
    mass_arrays, mass_shape = trie_on_device(compressed)
    arrays = SearchTrie(
        child_start=jnp.asarray(searched.child_start),
        child_count=jnp.asarray(searched.child_count),
        token=jnp.asarray(searched.token),
        leaf=jnp.asarray(searched.leaf),
        depth=jnp.asarray(searched.depth),
        edge_length=jnp.asarray(searched.edge_length),
        edge_tokens=jnp.asarray(edge_tokens_NxF, jnp.int32),
        longest=jnp.asarray(_longest_below(searched)),
        mass_node=jnp.asarray(_same_leaves(searched, compressed)),
        mass=mass_arrays,
    )
    shape = SearchShape(
        root_children=int(searched.child_count[0]),
        inner_children=max(1, int(searched.child_count[1:].max(initial=0))),
        edge_chunk=edge_chunk,
        suffix_size=max(1, int(searched.depth[inner_N].max())),
        mass=mass_shape,
    )
    return arrays, shape


def _longest_below(trie: ItemTrie) -> np.ndarray:
    """int32 [N]: length of the longest sequence below each node."""
    longest_N = np.where(trie.leaf >= 0, trie.depth, 0).astype(np.int32)
    ranges = list(zip(trie.level_offsets[1:-1], trie.level_offsets[2:], strict=True))
    for start, stop in reversed(ranges):
        np.maximum.at(longest_N, trie.parent[start:stop], longest_N[start:stop])
    return longest_N


def _same_leaves(trie: ItemTrie, compressed: ItemTrie) -> np.ndarray:
    """int32 [N]: for each node the node of the compressed trie with the same range of leaves."""

    def key(nodes: ItemTrie) -> np.ndarray:
        return nodes.leaf_start.astype(np.int64) * (trie.num_leaves + 1) + nodes.leaf_stop

    order = np.argsort(key(compressed), kind="stable")
    place_N = np.searchsorted(key(compressed), key(trie), sorter=order)
    return order[place_N].astype(np.int32)
