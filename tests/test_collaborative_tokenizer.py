"""The projection against a dictionary trie in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.collaborative_tokenizer import (
    node_log_mass,
    token_distributions,
    trie_on_device,
)
from tca4rec_jax.trie import ItemTrie

END = 0
VOCABULARY = 6


def brute_force(sequences, logits, prefix, beta=1.0):
    """p_cf(. | prefix) in float64, from the definition (method.md)."""
    inside = [i for i, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix]
    scores = np.asarray(logits, np.float64)[inside] / beta
    q = np.exp(scores - scores.max())
    q /= q.sum()
    p = np.zeros(VOCABULARY)
    for i, weight in zip(inside, q, strict=True):
        p[sequences[i][len(prefix)]] += weight
    return p


def check(words, logits_PxI, beta, rtol):
    sequences = [[*word, END] for word in words]
    trie = ItemTrie.build(sequences)
    small = trie.compress()
    nodes, probabilities = token_distributions(logits_PxI, trie, VOCABULARY, beta)
    assert nodes.size == (small.child_count > 0).sum()
    for k, n in enumerate(np.asarray(nodes)):
        prefix = tuple(small.tokens_QxL[small.leaf_start[n], : small.depth[n]].tolist())
        for p in range(logits_PxI.shape[0]):
            expected = brute_force(sequences, logits_PxI[p], prefix, beta)
            np.testing.assert_allclose(probabilities[p, k], expected, rtol=rtol, atol=1e-30)
            assert abs(float(probabilities[p, k].sum()) - 1.0) < 1e-6


titles = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=10)


@settings(max_examples=12, deadline=None)
@given(titles, st.integers(0, 2**31 - 1), st.sampled_from([0.5, 1.0, 2.0]))
def test_matches_the_definition(words, seed, beta):
    logits = np.random.default_rng(seed).normal(0, 2, (2, len(words))).astype(np.float32)
    check(words, logits, beta, rtol=2e-6 / min(beta, 1.0))


@pytest.mark.parametrize("spread", [60.0, -60.0])
def test_stays_exact_for_hopeless_items(spread):
    words = [[1, 2], [1, 3], [2], [1, 2, 4], [1, 2], []]
    logits = np.array([[spread, -spread, 0.0, spread / 2, -1.0, 3.0]], np.float32)
    check(words, logits, 1.0, rtol=1e-5)


def test_the_root_sums_over_all_items_and_a_constant_changes_nothing():
    sequences = [[1, 2, END], [1, END], [3, END], [1, 2, END]]
    arrays, shape = trie_on_device(ItemTrie.build(sequences).compress())
    logits = np.array([[0.3, -2.0, 1.5, 0.1]], np.float32)
    mass = node_log_mass(logits, arrays, shape)
    shifted = node_log_mass(logits + 50.0, arrays, shape)
    np.testing.assert_allclose(mass[0, 0], jax.nn.logsumexp(logits), rtol=1e-6)
    np.testing.assert_allclose(shifted - mass, jnp.full_like(mass, 50.0), atol=1e-5)


def test_token_by_token_trie_gives_the_same_distributions():
    sequences = [[1, 2, 3, END], [1, 2, 4, END], [2, END]]
    trie = ItemTrie.build(sequences)
    logits = np.array([[0.5, -1.0, 2.0]], np.float32)
    token_mass = node_log_mass(logits, *trie_on_device(trie))[0]
    forced = np.flatnonzero(trie.child_count == 1)
    np.testing.assert_array_equal(token_mass[trie.child_start[forced]], token_mass[forced])
