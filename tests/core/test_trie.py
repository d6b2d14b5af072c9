"""ItemTrie: shared titles and refused sequences. See test_properties.py for the rest."""

import numpy as np
import pytest

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged

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
