"""The arrays of an ItemTrie (core/trie.py), made of token sequences.

Axes: core/__init__.py; here L are the tokens of the longest title.
"""

from collections.abc import Sequence

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import ItemError, UserError

_MOST = 2**31 - 1


def check_count(count: int, what: str) -> None:
    """Raises UserError for more than int32 numbers."""
    if count > _MOST:
        raise UserError(
            f"the trie of the titles has {count:,} {what}, expected at most {_MOST:,}: shorten the "
            "titles (data.max_title_length)"
        )


def padded(sequences: Ragged | Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(lengths int32 [I], tokens int32 [I, L] padded with -1); raises as ItemTrie.build does."""
    if not len(sequences):
        raise UserError("the catalogue is empty: a trie needs at least one item")
    if not isinstance(sequences, Ragged):
        sequences = Ragged.of(sequences, np.int32)
    lengths_I = sequences.lengths.astype(np.int32)
    if (lengths_I == 0).any():
        raise ItemError("item ", int(np.argmin(lengths_I)), " has no tokens: its title is empty")
    if (sequences.values < 0).any():
        at = int(np.argmax(sequences.values < 0))
        raise ValueError(f"item {sequences.row_of(at)} has a negative token id")
    inside_IxL = np.arange(lengths_I.max()) < lengths_I[:, None]
    tokens_IxL = np.full(inside_IxL.shape, -1, np.int32)
    tokens_IxL[inside_IxL] = sequences.values[sequences.offsets[0] : sequences.offsets[-1]]
    return lengths_I, tokens_IxL


def lexicographic_order(tokens_IxL: np.ndarray) -> np.ndarray:
    """Stable order of the rows; a shorter row comes before its extensions (padding is -1)."""
    big_endian = np.ascontiguousarray((tokens_IxL + 1).astype(">u4"))
    rows = big_endian.view(f"S{4 * tokens_IxL.shape[1]}").ravel()
    return np.argsort(rows, kind="stable")


def shared_with_previous(rows_IxL: np.ndarray) -> np.ndarray:
    """int32 [I]: leading tokens equal to the row before (the width for equal rows; 0 for row 0)."""
    differs = rows_IxL[1:] != rows_IxL[:-1]
    shared = np.where(differs.any(axis=1), differs.argmax(axis=1), rows_IxL.shape[1])
    return np.concatenate([[0], shared]).astype(np.int32)


def token_nodes(shared_Q: np.ndarray, lengths_Q: np.ndarray) -> dict[str, np.ndarray]:
    """Node arrays of the token-by-token trie, from the sorted sequences' shared prefixes."""
    num_leaves, width = lengths_Q.size, int(lengths_Q.max())
    column = np.arange(1, width + 1, dtype=np.int32)
    inside_LxQ = column[:, None] <= lengths_Q
    is_new_LxQ = (column[:, None] > shared_Q) & inside_LxQ
    size_L = is_new_LxQ.sum(axis=1)
    num_nodes = 1 + int(size_L.sum())
    check_count(num_nodes, "nodes")
    # Row d of ids is the node of the first d tokens of each sequence: new nodes are numbered along
    # the rows, and a sequence without one there shares that of the sequence before it.
    ids_LxQ = np.zeros((width + 1, num_leaves), np.int32)
    ids_LxQ[1:][is_new_LxQ] = np.arange(1, num_nodes, dtype=np.int32)
    np.maximum.accumulate(ids_LxQ, axis=1, out=ids_LxQ)
    leaf_start = np.nonzero(is_new_LxQ)[1].astype(np.int32)
    leaves_below = np.bincount(ids_LxQ[1:][inside_LxQ], minlength=num_nodes)[1:]
    depth = np.repeat(np.arange(width + 1, dtype=np.int32), [1, *size_L])
    return nodes_of(
        level=depth,
        parent=np.concatenate([[-1], ids_LxQ[:-1][is_new_LxQ]]),
        depth=depth,
        leaf_start=np.concatenate([[0], leaf_start]),
        leaf_stop=np.concatenate([[num_leaves], leaf_start + leaves_below]),
    )


def nodes_of(level, parent, depth, leaf_start, leaf_stop) -> dict[str, np.ndarray]:
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
