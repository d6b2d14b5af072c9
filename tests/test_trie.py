"""ItemTrie against a dictionary trie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.trie import ItemTrie

END = 0


def prefixes(sequences):
    """Every prefix -> sorted next tokens, by brute force."""
    children = {}
    for sequence in sequences:
        for t in range(len(sequence)):
            children.setdefault(tuple(sequence[:t]), set()).add(sequence[t])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def node_prefix(trie, node):
    return tuple(trie.tokens_QxL[trie.leaf_start[node], : trie.depth[node]].tolist())


titles = st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=5), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(titles)
def test_nodes_children_and_leaves_match_a_dictionary(words):
    sequences = [[*word, END] for word in words]
    trie = ItemTrie.build(sequences)
    expected = prefixes(sequences)
    inner = np.flatnonzero(trie.child_count)
    assert {node_prefix(trie, n) for n in inner} == set(expected)
    for n in inner:
        children = np.arange(trie.child_start[n], trie.child_start[n] + trie.child_count[n])
        assert trie.token[children].tolist() == expected[node_prefix(trie, n)]
        assert (trie.parent[children] == n).all()
    items, offsets = trie.items_by_leaf
    for n in range(trie.num_nodes):
        prefix = node_prefix(trie, n)
        below = {i for i, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix}
        assert set(items[offsets[trie.leaf_start[n]] : offsets[trie.leaf_stop[n]]]) == below


@settings(max_examples=100, deadline=None)
@given(titles)
def test_compressed_trie_keeps_decisions_and_leaves(words):
    sequences = [[*word, END] for word in words]
    trie = ItemTrie.build(sequences)
    small = trie.compress()
    expected = prefixes(sequences)
    decisions = {prefix for prefix, tokens in expected.items() if len(tokens) > 1 or not prefix}
    inner = np.flatnonzero(small.child_count)
    assert {node_prefix(small, n) for n in inner} == decisions
    edges_NxE = small.edge_tokens(int(small.edge_length.max()))
    for n in range(1, small.num_nodes):
        edge = edges_NxE[n][edges_NxE[n] >= 0].tolist()
        assert list(node_prefix(small, small.parent[n])) + edge == list(node_prefix(small, n))
    for n in inner:
        children = np.arange(small.child_start[n], small.child_start[n] + small.child_count[n])
        assert (small.parent[children] == n).all()
        assert small.token[children].tolist() == expected[node_prefix(small, n)]
    for q, path in enumerate(small.paths_QxK):
        nodes = path[path >= 0]
        assert nodes[0] == 0
        assert small.leaf[nodes[-1]] == q
        assert (small.parent[nodes[1:]] == nodes[:-1]).all()


def test_items_that_share_a_title_share_a_leaf():
    trie = ItemTrie.build([[5, END], [3, END], [5, END]])
    items, offsets = trie.items_by_leaf
    assert trie.leaf_of_item.tolist() == [1, 0, 1]
    assert items[offsets[1] : offsets[2]].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "empty"),
        ([[1, END], []], "item 1 has no tokens"),
        ([[1, END], [1, -7, END]], "item 1 has a negative token"),
        ([[1, 2, 3], [1, 2]], "tokens of item 1 are a prefix of those of item 0"),
    ],
)
def test_bad_sequences_are_named(sequences, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie.build(sequences)
