"""The trie of tokenised titles, as flat arrays (host side, NumPy).

Axis letters: I items, Q distinct token sequences (leaves), L tokens of a sequence, N nodes.

Nodes are numbered breadth first (by level, then in lexicographic order of their tokens), the root
is node 0, so the children of a node are consecutive node ids and the nodes of a level are a slice.
The same class holds the trie token by token (every edge is one token) and compressed (chains of
single children merged into one edge of several tokens; its inner nodes are the decisions).
"""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError

_VERSION = 1  # of the file that `save` writes


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
        """Builds the token-by-token trie.

        Args:
          sequences: for each item its title's token ids, the end token included; a Ragged (values
            integer, such as TitleTokens.titles) spares a large catalogue an array per item.

        Raises:
          ValueError: if there is no item, a sequence is empty or has a negative token, or one
            sequence is a proper prefix of another (the end token is missing or not unique).
        """
        lengths_I, tokens_IxL = _padded(sequences)
        order_I = _lexicographic_order(tokens_IxL)
        sorted_IxL = tokens_IxL[order_I]
        shared_I = _shared_prefix_with_previous(sorted_IxL)
        is_new_I = shared_I < lengths_I[order_I]
        is_new_I[0] = True
        leaf_of_item = np.empty(lengths_I.size, np.int32)
        leaf_of_item[order_I] = np.cumsum(is_new_I) - 1

        tokens_QxL = sorted_IxL[is_new_I]
        lengths_Q = lengths_I[order_I][is_new_I]
        shared_Q = shared_I[is_new_I]
        swallowed_Q = np.flatnonzero(shared_Q[1:] >= lengths_Q[:-1])
        if swallowed_Q.size:
            items = [
                int(np.argmax(leaf_of_item == q)) for q in (swallowed_Q[0], swallowed_Q[0] + 1)
            ]
            raise UserError(
                f"the tokens of item {items[0]} are a prefix of those of item {items[1]}: "
                "end every title with an end token that occurs nowhere else in it"
            )
        return cls(tokens_QxL, lengths_Q, leaf_of_item, **_token_nodes(shared_Q, lengths_Q))

    def compress(self) -> "ItemTrie":
        """The same trie with every chain of single children merged into one edge.

        Its nodes are the root, the nodes with several children and the leaves, so every inner node
        but perhaps the root is a decision, and its levels count decisions instead of tokens.
        """
        kept_N = (self.child_count != 1) | (self.parent < 0)
        ancestor_N = np.full(self.num_nodes, -1, np.int32)  # nearest kept proper ancestor
        level_N = np.zeros(self.num_nodes, np.int32)
        for start, stop in zip(self.level_offsets[1:-1], self.level_offsets[2:], strict=True):
            parent = self.parent[start:stop]
            ancestor_N[start:stop] = np.where(kept_N[parent], parent, ancestor_N[parent])
            level_N[start:stop] = level_N[ancestor_N[start:stop]] + 1
        kept = np.flatnonzero(kept_N)
        kept = kept[np.lexsort((self.leaf_start[kept], level_N[kept]))]  # now breadth first
        new_N = np.full(self.num_nodes, -1, np.int32)
        new_N[kept] = np.arange(kept.size)
        nodes = _nodes(
            level=level_N[kept],
            parent=np.where(ancestor_N[kept] < 0, -1, new_N[ancestor_N[kept]]),
            depth=self.depth[kept],
            leaf_start=self.leaf_start[kept],
            leaf_stop=self.leaf_stop[kept],
        )
        return ItemTrie(self.tokens_QxL, self.lengths_Q, self.leaf_of_item, **nodes)

    def save(self, path: str | Path, content_hash: str) -> None:
        """Writes the trie to one .npz file, beside `path` first and then renamed.

        Args:
          path: an existing file is replaced; its folder must exist.
          content_hash: of what the trie was made from, see `trie_hash`.
        """
        path = Path(path)
        arrays = {name: getattr(self, name) for name in _stored_names()}
        beside = path.with_name(f".{path.name}.partial")
        try:
            with beside.open("wb") as file:
                np.savez(file, version=_VERSION, content_hash=content_hash, **arrays)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)  # there only if writing failed

    @classmethod
    def load(cls, path: str | Path, content_hash: str) -> "ItemTrie":
        """Reads what `save` wrote.

        Args:
          content_hash: the `trie_hash` of the present catalogue and tokenizer.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is damaged or no trie file, of another version, or was made from something
            else (another content hash).
        """
        remedy = "delete it and build the trie again"
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = dict(file)
        except (EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a trie file ({error}); {remedy}") from error
        if not np.array_equal(stored.get("version", _VERSION), _VERSION):
            raise UserError(
                f"{path} is a trie file of version {stored['version']}, this program reads version "
                f"{_VERSION}; {remedy}"
            )
        missing = {"version", "content_hash", *_stored_names()} - set(stored)
        if missing:
            raise UserError(f"{path} is not a trie file: {sorted(missing)} missing; {remedy}")
        if not np.array_equal(stored["content_hash"], content_hash):
            raise UserError(f"{path} was made from another catalogue or tokenizer; {remedy}")
        return cls(**{name: stored[name] for name in _stored_names()})

    @property
    def num_nodes(self) -> int:
        return self.parent.size

    @property
    def num_items(self) -> int:
        return self.leaf_of_item.size

    @property
    def num_leaves(self) -> int:
        return self.lengths_Q.size

    @property
    def num_levels(self) -> int:
        return self.level_offsets.size - 1

    @property
    def max_children(self) -> int:
        return int(self.child_count.max())

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

    def edge_tokens(self, length: int) -> np.ndarray:
        """int32 [N, length]: the first `length` tokens of every edge, padded with -1."""
        column_NxE = self.edge_start[:, None] + np.arange(length)
        inside_NxE = column_NxE < self.depth[:, None]
        last = self.tokens_QxL.shape[1] - 1
        tokens_NxE = self.tokens_QxL[self.leaf_start[:, None], np.minimum(column_NxE, last)]
        return np.where(inside_NxE, tokens_NxE, -1).astype(np.int32)

    @cached_property
    def items_by_leaf(self) -> tuple[np.ndarray, np.ndarray]:
        """(items int32 [I], offsets int64 [Q + 1]): the items of leaf q, in catalogue order."""
        items = np.argsort(self.leaf_of_item, kind="stable").astype(np.int32)
        counts = np.bincount(self.leaf_of_item, minlength=self.num_leaves)
        return items, np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def paths_QxK(self) -> np.ndarray:
        """int32 [Q, levels]: the node of each level on the way to leaf q, -1 below the leaf."""
        paths = np.full((self.num_leaves, self.num_levels), -1, np.int32)
        level_N = np.repeat(np.arange(self.num_levels), np.diff(self.level_offsets))
        node_Q = np.empty(self.num_leaves, np.int32)
        is_leaf = self.leaf >= 0
        node_Q[self.leaf[is_leaf]] = np.flatnonzero(is_leaf)
        for _ in range(self.num_levels):
            active = np.flatnonzero(node_Q >= 0)
            paths[active, level_N[node_Q[active]]] = node_Q[active]
            node_Q[active] = self.parent[node_Q[active]]
        return paths


def trie_hash(catalogue_hash: str, tokenizer_json: str, *template: str) -> str:
    """SHA-256 (hex) of everything that determines a trie.

    Args:
      catalogue_hash: Catalogue.content_hash().
      tokenizer_json: the tokenizer, for instance tokenizer.backend_tokenizer.to_str().
      *template: the texts that are tokenised with a title (PromptTemplate.before_title and .end).
    """
    digest = hashlib.sha256()
    for text in (catalogue_hash, tokenizer_json, *template):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))  # so that no two splits of a text are equal
        digest.update(data)
    return digest.hexdigest()


def _stored_names() -> list[str]:
    return [field.name for field in fields(ItemTrie)]


def _padded(sequences: Ragged | Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths int32 [I], tokens int32 [I, L] padded with -1), checked as `build` promises."""
    if not len(sequences):
        raise UserError("the catalogue is empty: a trie needs at least one item")
    if not isinstance(sequences, Ragged):
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        values = np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences])
        sequences = Ragged.from_lengths(values, lengths)
    lengths_I = sequences.lengths.astype(np.int32)
    if (lengths_I == 0).any():
        raise UserError(f"item {int(np.argmin(lengths_I))} has no tokens: its title is empty")
    if (sequences.values < 0).any():
        at = int(np.argmax(sequences.values < 0))
        item = int(np.searchsorted(sequences.offsets, at, side="right")) - 1
        raise ValueError(f"item {item} has a negative token id")
    tokens_IxL = np.full((lengths_I.size, lengths_I.max()), -1, np.int32)
    tokens_IxL[np.arange(tokens_IxL.shape[1]) < lengths_I[:, None]] = sequences.values
    return lengths_I, tokens_IxL


def _lexicographic_order(tokens_IxL: np.ndarray) -> np.ndarray:
    """Stable order of the rows; a shorter row comes before its extensions (padding is -1)."""
    big_endian = np.ascontiguousarray((tokens_IxL + 1).astype(">u4"))
    rows = big_endian.view(f"S{4 * tokens_IxL.shape[1]}").ravel()
    return np.argsort(rows, kind="stable")


def _shared_prefix_with_previous(rows_IxL: np.ndarray) -> np.ndarray:
    """int32 [I]: leading tokens equal to the row before (the width for equal rows; 0 for row 0)."""
    differs = rows_IxL[1:] != rows_IxL[:-1]
    shared = np.where(differs.any(axis=1), differs.argmax(axis=1), rows_IxL.shape[1])
    return np.concatenate([[0], shared]).astype(np.int32)


def _token_nodes(shared_Q: np.ndarray, lengths_Q: np.ndarray) -> dict[str, np.ndarray]:
    """Node arrays of the token-by-token trie, from the sorted sequences' shared prefixes."""
    num_leaves, width = lengths_Q.size, int(lengths_Q.max())
    column = np.arange(1, width + 1, dtype=np.int32)
    inside_LxQ = column[:, None] <= lengths_Q
    is_new_LxQ = (column[:, None] > shared_Q) & inside_LxQ
    size_L = is_new_LxQ.sum(axis=1)
    num_nodes = 1 + int(size_L.sum())
    # Row d of ids is the node of the first d tokens of each sequence: new nodes are numbered along
    # the rows, and a sequence without one there shares that of the sequence before it.
    ids_LxQ = np.zeros((width + 1, num_leaves), np.int32)
    ids_LxQ[1:][is_new_LxQ] = np.arange(1, num_nodes, dtype=np.int32)
    np.maximum.accumulate(ids_LxQ, axis=1, out=ids_LxQ)
    leaf_start = np.nonzero(is_new_LxQ)[1].astype(np.int32)
    leaves_below = np.bincount(ids_LxQ[1:][inside_LxQ], minlength=num_nodes)[1:]
    depth = np.repeat(np.arange(width + 1, dtype=np.int32), [1, *size_L])
    return _nodes(
        level=depth,
        parent=np.concatenate([[-1], ids_LxQ[:-1][is_new_LxQ]]),
        depth=depth,
        leaf_start=np.concatenate([[0], leaf_start]),
        leaf_stop=np.concatenate([[num_leaves], leaf_start + leaves_below]),
    )


def _nodes(level, parent, depth, leaf_start, leaf_stop) -> dict[str, np.ndarray]:
    """An ItemTrie's node arrays, from those of nodes in breadth-first order."""
    child_count = np.bincount(parent[1:], minlength=parent.size)
    nodes = {
        "parent": parent,
        "depth": depth,
        # Breadth first: the children of all nodes follow each other in the order of their parents.
        "child_start": 1 + np.cumsum(child_count) - child_count,
        "child_count": child_count,
        "leaf_start": leaf_start,
        "leaf_stop": leaf_stop,
    }
    nodes = {name: array.astype(np.int32) for name, array in nodes.items()}
    nodes["level_offsets"] = np.concatenate([[0], np.cumsum(np.bincount(level))])
    return nodes
