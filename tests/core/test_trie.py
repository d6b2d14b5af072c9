"""ItemTrie: shared titles and refused sequences. See test_properties.py for the rest."""

import tracemalloc

import numpy as np
import pytest

from tca4rec_jax.core import trie_nodes
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError

END = 0


def test_items_that_share_a_title_share_a_leaf():
    trie = ItemTrie.build([[5, END], [3, END], [5, END]])
    assert trie.leaf_of_item.tolist() == [1, 0, 1]
    assert trie.items_by_leaf[1].tolist() == [0, 2]


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
    values = np.array([token for sequence in sequences for token in sequence], np.int32)
    with pytest.raises(ValueError, match=message):
        ItemTrie.build(Ragged.from_lengths(values, [len(sequence) for sequence in sequences]))


def test_what_int32_does_not_count_is_refused(monkeypatch):
    """A root and five nodes; compressed, a root and two leaves, whose edges have five tokens."""
    sequences = [[5, 6, END], [3, END]]
    trie = ItemTrie.build(sequences).compress()
    monkeypatch.setattr(trie_nodes, "_MOST", 5)
    assert DeviceTrie.on_host(trie).edge_offset.tolist() == [0, 0, 2]
    with pytest.raises(UserError, match="has 6 nodes, expected at most 5: shorten the titles"):
        ItemTrie.build(sequences)
    monkeypatch.setattr(trie_nodes, "_MOST", 4)
    with pytest.raises(UserError, match="has 5 tokens of edges, expected at most 4"):
        DeviceTrie.on_host(trie)


def test_rows_that_begin_within_larger_ones_make_the_same_trie():
    sequences = Ragged.of([[5, 6, END], [3, END]], np.int64)
    values = np.concatenate([[7, 8], sequences.values, [9]])
    trie = ItemTrie.build(Ragged(values, sequences.offsets + 2))
    assert trie.tokens_QxL.tolist() == [[3, END, -1], [5, 6, END]]
    assert trie.tokens_QxL.dtype == np.int32


def test_titles_are_padded_in_little_more_memory_than_they_take():
    sequences = Ragged.from_lengths(np.ones(300_000, np.int32), np.full(10_000, 30))
    tracemalloc.start()
    _, tokens_IxL = trie_nodes.padded(sequences)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens_IxL.shape == (10_000, 30)
    assert peak < 7 * tokens_IxL.size  # an int32, and a flag
