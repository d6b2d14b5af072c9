"""The item trie in the form that beam search reads: device arrays and static sizes.

Axis letters: N trie nodes, F tokens of all edges, U tokens that some node chooses from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import TrieArrays, TrieShape, trie_on_device
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import ranges


class SearchTrie(NamedTuple):
    """Device arrays of the trie that is searched, and of the compressed trie for the guidance."""

    child_start: jax.Array  # int32 [N]
    child_count: jax.Array  # int32 [N]
    leaf: jax.Array  # int32 [N], -1 for inner nodes
    depth: jax.Array  # int32 [N], tokens from the root
    edge_start: jax.Array  # int32 [N], depth at which the edge into the node begins
    edge_offset: jax.Array  # int32 [N], where the edge's tokens begin in `edge_tokens`
    edge_tokens: jax.Array  # int32 [F], every edge's tokens, one edge after the other
    run_length: jax.Array  # int32 [N], tokens of the edge that the LLM must read
    longest: jax.Array  # int32 [N], tokens of the longest sequence below the node
    choice: jax.Array  # int32 [U], ascending: the first tokens of all edges
    choice_index: jax.Array  # int32 [N], where the edge's first token is in `choice`
    mass_node: jax.Array  # int32 [N], the node of the compressed trie with the same leaves
    mass: TrieArrays  # the compressed trie


class SearchShape(NamedTuple):
    """The static sizes that go with a SearchTrie (hashable: a static argument of jit)."""

    root_children: int
    inner_children: int  # most children of a node other than the root
    longest_run: int  # most tokens of an edge that the LLM must read
    suffix_size: int  # most tokens the LLM ever reads for one hypothesis
    beam_reads: int  # most tokens it reads for one of the beams, whichever hypotheses that holds
    mass: TrieShape


def search_trie(
    trie: ItemTrie, *, compress: bool, score_edges: bool
) -> tuple[SearchTrie, SearchShape]:
    """Prepares a token-by-token trie for beam search.

    Args:
      trie: from `ItemTrie.build`.
      compress: search the compressed trie, one decision per step, instead of token by token.
      score_edges: forced tokens have a log-probability below 0 ('after_softmax'), so the edges into
        leaves are read too; without it a title is scored by its decisions alone.
    """
    compressed = trie.compress()
    searched = compressed if compress else trie
    inner_N = searched.child_count > 0
    # The last token of a title is predicted, never read.
    of_leaf_N = searched.edge_length - 1 if score_edges else np.zeros_like(searched.edge_length)
    run_length_N = np.where(inner_N, searched.edge_length, of_leaf_N).astype(np.int32)
    choice_U = np.unique(searched.token[1:])
    mass_arrays, mass_shape = trie_on_device(compressed)
    edge_offset_N, edge_tokens_F = _flat_edges(searched)
    arrays = SearchTrie(
        child_start=searched.child_start,
        child_count=searched.child_count,
        leaf=searched.leaf,
        depth=searched.depth,
        edge_start=searched.edge_start,
        edge_offset=edge_offset_N,
        edge_tokens=edge_tokens_F,
        run_length=run_length_N,
        longest=_longest_below(searched),
        choice=choice_U,
        choice_index=np.searchsorted(choice_U, searched.token).astype(np.int32),
        mass_node=_same_leaves(searched, compressed),
        mass=mass_arrays,
    )
    shape = SearchShape(
        root_children=int(searched.child_count[0]),
        inner_children=max(1, int(searched.child_count[1:].max(initial=0))),
        longest_run=max(1, int(run_length_N.max())),
        suffix_size=max(
            1, int(np.where(run_length_N, searched.edge_start + run_length_N, 0).max())
        ),
        beam_reads=max(
            1, int(np.maximum.reduceat(run_length_N, searched.level_offsets[:-1]).sum())
        ),
        mass=mass_shape,
    )
    return jax.tree.map(jnp.asarray, arrays), shape


def _flat_edges(trie: ItemTrie) -> tuple[np.ndarray, np.ndarray]:
    """(offset int32 [N], tokens int32 [F]) of all edges one after the other."""
    length_N = trie.edge_length.astype(np.int64)
    offset_N = np.cumsum(length_N) - length_N
    column_F = ranges(trie.edge_start, length_N)
    leaf_F = np.repeat(trie.leaf_start, length_N)
    return offset_N.astype(np.int32), trie.tokens_QxL[leaf_F, column_F].astype(np.int32)


def _longest_below(trie: ItemTrie) -> np.ndarray:
    """int32 [N]: length of the longest sequence below each node."""
    longest_N = np.where(trie.leaf >= 0, trie.depth, 0).astype(np.int32)
    levels = list(zip(trie.level_offsets[1:-1], trie.level_offsets[2:], strict=True))
    for start, stop in reversed(levels):
        np.maximum.at(longest_N, trie.parent[start:stop], longest_N[start:stop])
    return longest_N


def _same_leaves(trie: ItemTrie, compressed: ItemTrie) -> np.ndarray:
    """int32 [N]: for each node the node of the compressed trie with the same range of leaves."""

    def key(nodes: ItemTrie) -> np.ndarray:
        return nodes.leaf_start.astype(np.int64) * (trie.num_leaves + 1) + nodes.leaf_stop

    order = np.argsort(key(compressed), kind="stable")
    place_N = np.searchsorted(key(compressed), key(trie), sorter=order)
    return order[place_N].astype(np.int32)
