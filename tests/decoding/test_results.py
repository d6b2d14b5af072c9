"""Items of found titles against a loop over rows, titles and items."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.decoding import results
from tca4rec_jax.decoding.results import Recommendations


def listed(trie, leaves_M, count, allowed_I):
    items = [
        item
        for leaf in leaves_M[leaves_M >= 0]
        for item in np.flatnonzero(trie.leaf_of_item == leaf)
        if allowed_I[item]
    ]
    return (items + [-1] * count)[:count]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 12)),
    st.integers(0, 10**6),
    st.sampled_from([1, 40, 1 << 22]),
    st.booleans(),
)
def test_items_are_those_of_the_titles_in_turn(titles, sizes, seed, pairs, all_allowed):
    trie = ItemTrie.build([[title, 9] for title in titles])
    rows, beams, count = sizes
    rng = np.random.default_rng(seed)
    leaves_RxM = np.full((rows, beams), -1, np.int32)
    for leaves_M in leaves_RxM:
        found = rng.permutation(trie.num_leaves)[: rng.integers(0, beams + 1)]
        leaves_M[: found.size] = found
    allowed_RxI = rng.random((rows, len(titles))) < (2 if all_allowed else 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_PAIRS", pairs)
        allowed = None if all_allowed else allowed_RxI.__getitem__
        items_RxK = Recommendations(leaves_RxM, None, None).items(trie, count, allowed)
    assert (items_RxK.dtype, items_RxK.shape) == (np.int32, (rows, count))
    for row in range(rows):
        expected = listed(trie, leaves_RxM[row], count, allowed_RxI[row])
        assert items_RxK[row].tolist() == expected


@pytest.mark.parametrize("all_allowed", [True, False])
def test_a_title_of_many_items_takes_little_memory_in_many_rows(all_allowed, monkeypatch):
    monkeypatch.setattr(results, "_PAIRS", 1 << 14)
    trie = ItemTrie.build([[1, 9]] * 3000 + [[2, 9]])
    found = Recommendations(np.tile(np.array([[1, 0]], np.int32), (300, 1)), None, None)
    trie.items_by_leaf  # noqa: B018 (kept from here on)
    odd_I = np.arange(3001) % 2 == 1
    allowed = None if all_allowed else lambda rows_B: np.tile(odd_I, (len(rows_B), 1))
    tracemalloc.start()
    items_RxK = found.items(trie, 4, allowed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = [3000, 0, 1, 2] if all_allowed else [1, 3, 5, 7]
    assert items_RxK.tolist() == [expected] * 300
    assert peak < 300 * 3000 * 2  # before, 33 bytes a row and item
