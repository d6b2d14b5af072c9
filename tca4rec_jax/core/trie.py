"""The trie of tokenised titles: `ItemTrie` on the host (NumPy), `DeviceTrie` on the device.

Nodes are numbered breadth first (by level, then in lexicographic order of their tokens), the root
is node 0, so the children of a node are consecutive node ids and the nodes of a level are a slice.
Both classes hold the trie token by token (every edge is one token) or compressed (chains of single
children merged into one edge of several tokens; its inner nodes are the decisions).

Axes: core/__init__.py; here L are the tokens of the longest title.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.trie_nodes import (
    check_count,
    lexicographic_order,
    nodes_of,
    padded,
    shared_with_previous,
    token_nodes,
)
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.errors import ItemError


@dataclass(frozen=True)
class ItemTrie:
    """A prefix tree over the token sequences of a catalogue's titles.

    Attributes:
      tokens_QxL: int32, the distinct sequences in lexicographic order, padded with -1.
      lengths_Q: int32, tokens of each sequence, the end token included.
      leaf_of_item: int32 [I], the sequence of each item; items may share one.
      parent: int32 [N], parent node (-1 for the root).
      depth: int32 [N], tokens from the root to the end of the node's edge.
      child_start, child_count: int32 [N], the first child and how many there are.
      leaf_start, leaf_stop: int32 [N], the range of sequences below the node.
      level_offsets: int64 [levels + 1], where each level's nodes begin, and their number.
    """

    tokens_QxL: np.ndarray
    lengths_Q: np.ndarray
    leaf_of_item: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    child_start: np.ndarray
    child_count: np.ndarray
    leaf_start: np.ndarray
    leaf_stop: np.ndarray
    level_offsets: np.ndarray

    @classmethod
    def build(cls, sequences: Ragged | Sequence[Sequence[int]]) -> "ItemTrie":
        """Builds the token-by-token trie of each item's token ids (int), the end token included.

        Raises ValueError if there is no item, a sequence is empty or has a negative token, or one
        is a proper prefix of another (the end token is missing or not unique).
        """
        lengths_I, tokens_IxL = padded(sequences)
        order_I = lexicographic_order(tokens_IxL)
        sorted_IxL = tokens_IxL[order_I]
        shared_I = shared_with_previous(sorted_IxL)
        is_new_I = shared_I < lengths_I[order_I]
        is_new_I[0] = True
        leaf_of_item = np.empty(lengths_I.size, np.int32)
        leaf_of_item[order_I] = np.cumsum(is_new_I) - 1

        tokens_QxL = sorted_IxL[is_new_I]
        lengths_Q = lengths_I[order_I][is_new_I]
        shared_Q = shared_I[is_new_I]
        swallowed_Q = np.flatnonzero(shared_Q[1:] >= lengths_Q[:-1])
        if swallowed_Q.size:
            pair = swallowed_Q[0] + np.arange(2)
            item, longer = (int(np.argmax(leaf_of_item == q)) for q in pair)
            raise ItemError(
                *("the tokens of item ", item, " are a prefix of those of item ", longer),
                ": end every title with an end token that occurs nowhere else in it",
            )
        return cls(tokens_QxL, lengths_Q, leaf_of_item, **token_nodes(shared_Q, lengths_Q))

    def compress(self) -> "ItemTrie":
        """The same trie with every chain of single children merged into one edge.

        Its nodes are the root, the nodes with several children and the leaves, so every inner node
        but perhaps the root is a decision, and its levels count decisions instead of tokens.
        """
        kept_N = (self.child_count != 1) | (self.parent < 0)
        ancestor_N = np.full(self.num_nodes, -1, np.int32)  # nearest kept proper ancestor
        level_N = np.zeros(self.num_nodes, np.int32)
        for start, stop in itertools.pairwise(self.level_offsets[1:]):
            parent = self.parent[start:stop]
            ancestor_N[start:stop] = np.where(kept_N[parent], parent, ancestor_N[parent])
            level_N[start:stop] = level_N[ancestor_N[start:stop]] + 1
        kept = np.flatnonzero(kept_N)
        kept = kept[np.lexsort((self.leaf_start[kept], level_N[kept]))]  # now breadth first
        new_N = np.full(self.num_nodes, -1, np.int32)
        new_N[kept] = np.arange(kept.size)
        nodes = nodes_of(
            level=level_N[kept],
            parent=np.where(ancestor_N[kept] < 0, -1, new_N[ancestor_N[kept]]),
            depth=self.depth[kept],
            leaf_start=self.leaf_start[kept],
            leaf_stop=self.leaf_stop[kept],
        )
        return ItemTrie(self.tokens_QxL, self.lengths_Q, self.leaf_of_item, **nodes)

    @property
    def num_nodes(self) -> int:
        """The number of nodes N, with the root."""
        return self.parent.size

    @property
    def num_items(self) -> int:
        """The number of items I."""
        return self.leaf_of_item.size

    @property
    def num_leaves(self) -> int:
        """The number of leaves Q, one a distinct title."""
        return self.lengths_Q.size

    @cached_property
    def leaf(self) -> np.ndarray:
        """int32 [N]: the sequence that ends at the node, -1 for inner nodes."""
        return np.where(self.child_count == 0, self.leaf_start, -1).astype(np.int32)

    @cached_property
    def edge_start(self) -> np.ndarray:
        """int32 [N]: depth of the parent, where the node's edge begins (0 for the root)."""
        return np.where(self.parent < 0, 0, self.depth[self.parent]).astype(np.int32)

    @cached_property
    def edge_length(self) -> np.ndarray:
        """int32 [N]: tokens on the edge into the node (0 for the root)."""
        return (self.depth - self.edge_start).astype(np.int32)

    @cached_property
    def token(self) -> np.ndarray:
        """int32 [N]: first token of the edge into the node, -1 for the root."""
        first_N = self.tokens_QxL[self.leaf_start, self.edge_start]
        return np.where(self.parent < 0, -1, first_N).astype(np.int32)

    @cached_property
    def edge_tokens(self) -> Ragged:
        """int32, a row a node: the tokens of the edge into it."""
        length_N = self.edge_length.astype(np.int64)
        leaf_F = np.repeat(self.leaf_start, length_N)
        tokens_F = self.tokens_QxL[leaf_F, ranges(self.edge_start, length_N)]
        return Ragged.from_lengths(tokens_F.astype(np.int32), length_N)

    @cached_property
    def longest(self) -> np.ndarray:
        """int32 [N]: tokens of the longest sequence below each node."""
        longest_N = np.where(self.leaf >= 0, self.depth, 0).astype(np.int32)
        for start, stop in reversed([*itertools.pairwise(self.level_offsets[1:])]):
            np.maximum.at(longest_N, self.parent[start:stop], longest_N[start:stop])
        return longest_N

    @cached_property
    def items_by_leaf(self) -> Ragged:
        """int32, a row a leaf: its items, in catalogue order."""
        items_I = np.argsort(self.leaf_of_item, kind="stable").astype(np.int32)
        counts_Q = np.bincount(self.leaf_of_item, minlength=self.num_leaves)
        return Ragged.from_lengths(items_I, counts_Q)

    @cached_property
    def paths_QxK(self) -> np.ndarray:
        """int32 [Q, levels]: the node of each level on the way to leaf q, -1 below the leaf."""
        levels = self.level_offsets.size - 1
        paths = np.full((self.num_leaves, levels), -1, np.int32)
        level_N = np.repeat(np.arange(levels), np.diff(self.level_offsets))
        node_Q = np.empty(self.num_leaves, np.int32)
        is_leaf = self.leaf >= 0
        node_Q[self.leaf[is_leaf]] = np.flatnonzero(is_leaf)
        for _ in range(levels):
            active = np.flatnonzero(node_Q >= 0)
            paths[active, level_N[node_Q[active]]] = node_Q[active]
            node_Q[active] = self.parent[node_Q[active]]
        return paths


@dataclass(frozen=True)
class TrieSizes:
    """The static sizes of a DeviceTrie (hashable: they are part of what a program is compiled for).

    Attributes:
      num_leaves: Q.
      level_offsets: where each level's nodes begin, and their number.
      root_children: children of the root.
      inner_children: most children of another node, at least 1.
      longest_run: most tokens of an edge that the LLM reads, at least 1.
      longest_path: most tokens that the LLM reads of a title, at least 1.
      beam_reads: most tokens that it reads for one beam, whichever titles the beam holds in turn.
    """

    num_leaves: int
    level_offsets: tuple[int, ...]
    root_children: int
    inner_children: int
    longest_run: int
    longest_path: int
    beam_reads: int

    @property
    def num_nodes(self) -> int:
        """The number of nodes N, with the root."""
        return self.level_offsets[-1]

    @property
    def first_decision(self) -> int:
        """The first node with several children of a compressed trie: the root, or its child."""
        return int(self.root_children == 1)

    @property
    def max_children(self) -> int:
        """The most children C of a node."""
        return max(self.root_children, self.inner_children)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceTrie:
    """A trie for jitted programs: int32 arrays and, static, their sizes.

    Training, search and compile-ahead take the same form (compile-ahead with ShapeDtypeStructs).

    Attributes:
      parent, depth, child_start, child_count, leaf_start, leaf_stop, leaf, token, longest: [N], as
        in ItemTrie.
      edge_length: [N], tokens on the edge into the node (0 for the root).
      edge_offset: [N], where the edge's tokens begin in `edge_tokens`.
      run_length: [N], tokens of the edge that the LLM reads in a search.
      choice_index: [N], where the edge's first token is in `choice` (0 for the root).
      choice: [U], ascending: the first tokens of all edges. No other token is ever chosen.
      edge_tokens: [F], the tokens of every edge, one edge after the other.
      item_order: [I], the items in the order of their leaves.
      ordered_leaf: [I], their leaves, ascending; Q and above stand for no item (padding).
    """

    parent: jax.Array
    depth: jax.Array
    child_start: jax.Array
    child_count: jax.Array
    leaf_start: jax.Array
    leaf_stop: jax.Array
    leaf: jax.Array
    token: jax.Array
    longest: jax.Array
    edge_length: jax.Array
    edge_offset: jax.Array
    run_length: jax.Array
    choice_index: jax.Array
    choice: jax.Array
    edge_tokens: jax.Array
    item_order: jax.Array
    ordered_leaf: jax.Array
    sizes: TrieSizes = field(metadata={"static": True})

    @classmethod
    def of(cls, trie: ItemTrie, *, item_shards: int = 1, score_edges: bool = False) -> "DeviceTrie":
        """The arrays of a trie, on the default device: `on_host`, which says what they are."""
        on_host = cls.on_host(trie, item_shards=item_shards, score_edges=score_edges)
        return jax.tree.map(jnp.asarray, on_host)

    @classmethod
    def on_host(
        cls, trie: ItemTrie, *, item_shards: int = 1, score_edges: bool = False
    ) -> "DeviceTrie":
        """The arrays of a trie as NumPy arrays, to be put where there is room.

        Args:
          trie: `ItemTrie.build(..).compress()`, or token by token for a search that asks for it.
          item_shards: into how many equal slices the item axis of the CF logits is sharded.
            `item_order` and `ordered_leaf` then hold the shards one after the other, to be sharded
            over the mesh axis of the logits. The items are padded to a multiple of item_shards; pad
            the logits alike, with any finite value.
          score_edges: forced tokens are scored too (softmax over the vocabulary), so a search reads
            the edges into leaves to their last token but one; else it never reads them.
        """
        item_order_I, ordered_leaf_I = _items_by_leaf(trie, item_shards)
        edges = trie.edge_tokens
        check_count(edges.values.size, "tokens of edges")
        of_leaf_N = np.maximum(trie.edge_length - 1, 0) if score_edges else 0
        run_N = np.where(trie.child_count > 0, trie.edge_length, of_leaf_N).astype(np.int32)
        choice_U = np.unique(trie.token[1:])
        path_N = np.where(run_N, trie.edge_start + run_N, 0)
        names = [one.name for one in fields(cls)]
        arrays = {name: getattr(trie, name) for name in names if hasattr(trie, name)} | {
            "edge_offset": edges.offsets[:-1].astype(np.int32),
            "run_length": run_N,
            "choice_index": np.searchsorted(choice_U, trie.token).astype(np.int32),
            "choice": choice_U,
            "edge_tokens": edges.values,
            "item_order": item_order_I,
            "ordered_leaf": ordered_leaf_I,
        }
        level_run = np.maximum.reduceat(run_N, trie.level_offsets[:-1])
        sizes = TrieSizes(
            num_leaves=trie.num_leaves,
            level_offsets=tuple(trie.level_offsets.tolist()),
            root_children=int(trie.child_count[0]),
            inner_children=max(1, int(trie.child_count[1:].max(initial=0))),
            longest_run=max(1, int(run_N.max())),
            longest_path=max(1, int(path_N.max())),
            beam_reads=max(1, int(level_run.sum())),
        )
        return cls(**arrays, sizes=sizes)

    def children(self, node: jax.Array, count: int | None = None) -> tuple[jax.Array, jax.Array]:
        """(ids int32 [..., C], 0 where there is none; is_child bool [..., C]) of nodes [...].

        `count` is C, static: at least the most children of these nodes, by default of all nodes.
        """
        offset_C = jnp.arange(self.sizes.max_children if count is None else count, dtype=jnp.int32)
        offset = jnp.expand_dims(offset_C, tuple(range(node.ndim)))
        is_child = offset < self.child_count[node][..., None]
        return jnp.where(is_child, self.child_start[node][..., None] + offset, 0), is_child


def _items_by_leaf(trie: ItemTrie, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """(items, their leaves ascending), int32 [I padded], of each shard one after the other."""
    size = -(-trie.num_items // shards)
    leaf_I = np.full(shards * size, trie.num_leaves, np.int32)
    leaf_I[: trie.num_items] = trie.leaf_of_item
    leaf_SxI = leaf_I.reshape(shards, size)
    order_SxI = np.argsort(leaf_SxI, axis=1, kind="stable").astype(np.int32)
    return order_SxI.ravel(), np.take_along_axis(leaf_SxI, order_SxI, axis=1).ravel()
