"""The projection against a dictionary trie in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from tca4rec_jax.core.collaborative_tokenizer import (
    CFItems,
    cf_logits,
    child_log_probs,
    node_log_mass,
    project,
)
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.inspection import token_distributions

END = 0
VOCABULARY = 6
mass_of = jax.jit(node_log_mass)
distributions_of = jax.jit(child_log_probs)
projected = jax.jit(project, static_argnames="pairs_at_once")


def brute_force(sequences, logits, prefix, beta=1.0):
    """p_cf(. | prefix) in float64, from the definition (docs/method.md)."""
    inside = [i for i, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix]
    scores = np.asarray(logits, np.float64)[inside] / beta
    q = np.exp(scores - scores.max())
    q /= q.sum()
    p = np.zeros(VOCABULARY)
    for i, weight in zip(inside, q, strict=True):
        p[sequences[i][len(prefix)]] += weight
    return p


def check(words, logits_PxI, beta, rtol):
    """Every prefix of every item under every row of logits, against the definition."""
    sequences = [[*word, END] for word in words]
    row_B = np.repeat(np.arange(len(logits_PxI)), len(words))
    target_B = np.tile(np.arange(len(words)), len(logits_PxI))
    trie = ItemTrie.build(sequences)
    p_BxTxV = np.asarray(token_distributions(logits_PxI[row_B], trie, target_B, VOCABULARY, beta))
    assert p_BxTxV.shape == (row_B.size, max(map(len, sequences)), VOCABULARY)
    for b, (row, target) in enumerate(zip(row_B, target_B, strict=True)):
        length = len(sequences[target])
        assert not p_BxTxV[b, length:].any()
        np.testing.assert_allclose(p_BxTxV[b, :length].sum(axis=1), 1.0, atol=1e-6)
        for t in range(length):
            expected = brute_force(sequences, logits_PxI[row], tuple(sequences[target][:t]), beta)
            np.testing.assert_allclose(p_BxTxV[b, t], expected, rtol=rtol, atol=1e-30)


titles = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=10)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(titles, st.integers(0, 2**31 - 1), st.sampled_from([0.5, 1.0, 2.0]))
def test_matches_the_definition(words, seed, beta):
    logits = np.random.default_rng(seed).normal(0, 2, (2, len(words))).astype(np.float32)
    check(words, logits, beta, rtol=2e-6 / min(beta, 1.0))


def test_the_dense_view_is_the_definition_for_hopeless_items_too():
    words = [[1, 2], [1, 3], [2], [1, 2, 4], [1, 2], []]
    logits = np.array(
        [[60.0, -60.0, 0.0, 30.0, -1.0, 3.0], [-60.0, 60.0, 0.0, -30.0, -1.0, 3.0]], np.float32
    )
    check(words, logits, 1.0, rtol=1e-5)
    check(words, logits / 20, 0.5, rtol=1e-5)


def test_the_root_sums_over_all_items_and_a_constant_changes_nothing():
    sequences = [[1, 2, END], [1, END], [3, END], [1, 2, END]]
    trie = DeviceTrie.of(ItemTrie.build(sequences).compress())
    logits = np.array([[0.3, -2.0, 1.5, 0.1]], np.float32)
    mass = mass_of(logits, trie)
    shifted = mass_of(logits + 50.0, trie)
    np.testing.assert_allclose(mass[0, 0], jax.nn.logsumexp(logits), rtol=1e-6)
    np.testing.assert_allclose(shifted - mass, jnp.full_like(mass, 50.0), atol=1e-5)


def test_stays_exact_over_hundreds_of_thousands_of_items():
    rng = np.random.default_rng(0)
    word_I = rng.integers(1, 4, 300_000)  # three titles, each shared by a third of the items
    tokens = np.stack([word_I, np.zeros_like(word_I)], axis=1).ravel()
    trie = ItemTrie.build(Ragged.from_lengths(tokens, np.full(word_I.size, 2)))
    logits = rng.normal(0, 5, (2, word_I.size)).astype(np.float32)
    p_BxTxV = token_distributions(logits, trie, np.array([0, 0]), 4)
    for row, logits_I in enumerate(logits.astype(np.float64)):
        mass = np.array([np.exp(logits_I[word_I == word]).sum() for word in (1, 2, 3)])
        np.testing.assert_allclose(p_BxTxV[row, 0, 1:], mass / mass.sum(), rtol=5e-6)


def random_catalogue(seed, items=300):
    rng = np.random.default_rng(seed)
    words = [rng.integers(1, 5, rng.integers(0, 5)).tolist() for _ in range(items)]
    return ItemTrie.build([[*word, END] for word in words])


def decisions_of(trie, count, pairs, seed=0):
    """Random decisions (inner nodes of the compressed trie), each of a random pair."""
    rng = np.random.default_rng(seed)
    inner = np.flatnonzero(trie.child_count > 0)
    return rng.integers(0, pairs, count), rng.choice(inner, count)


def test_many_pairs_in_groups_equal_all_at_once():
    trie = random_catalogue(0).compress()
    arrays = DeviceTrie.of(trie)
    rng = np.random.default_rng(1)
    vectors = jnp.asarray(rng.normal(size=(11, 4)), jnp.float32)
    items = CFItems(
        jnp.asarray(rng.normal(size=(300, 4)), jnp.float32), jnp.asarray(rng.normal(size=300))
    )
    pair_K, node_K = decisions_of(trie, 40, 11)
    pair_K = np.where(pair_K % 3 == 1, 5, pair_K)  # pairs without a decision are left out
    mass = mass_of(cf_logits(vectors, items), arrays, 0.7)
    expected = distributions_of(mass, pair_K, node_K, arrays)
    for pairs_at_once in (None, 11, 4, 1):
        log_p = projected(vectors, items, pair_K, node_K, arrays, 0.7, pairs_at_once=pairs_at_once)
        np.testing.assert_allclose(log_p, expected, rtol=1e-5, atol=1e-6)


def test_items_sharded_over_devices_give_the_same_distributions():
    trie = random_catalogue(2, items=301).compress()  # one shard is padded
    logits = jnp.asarray(np.random.default_rng(3).uniform(-60, 60, (5, 301)), jnp.float32)
    pair_K, node_K = decisions_of(trie, 30, 5)
    expected = projected(logits, CFItems(), pair_K, node_K, DeviceTrie.of(trie))
    devices = len(jax.devices())
    assert devices > 1
    sharded = DeviceTrie.of(trie, item_shards=devices)
    padding = sharded.item_order.size - 301
    items, everywhere = PartitionSpec("items"), PartitionSpec()
    specs = jax.tree.map(lambda _: everywhere, sharded)
    on_mesh = jax.shard_map(
        lambda logits, trie: project(
            logits, CFItems(), pair_K, node_K, trie, axis_name="items", pairs_at_once=2
        ),
        mesh=jax.make_mesh((devices,), ("items",), axis_types=(AxisType.Auto,)),
        in_specs=(
            PartitionSpec(None, "items"),
            dataclasses.replace(specs, item_order=items, ordered_leaf=items),
        ),
        out_specs=everywhere,
        check_vma=False,
    )
    program = jax.jit(on_mesh).lower(jnp.pad(logits, ((0, 0), (0, padding))), sharded).compile()
    assert "all-gather" not in program.as_text()
    joined = program(jnp.pad(logits, ((0, 0), (0, padding))), sharded)
    np.testing.assert_allclose(jnp.exp(joined), jnp.exp(expected), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_of_any_float_type_are_projected_in_float32(dtype):
    trie = random_catalogue(4)
    stored = jnp.asarray(np.random.default_rng(5).normal(0, 5, (2, 300)), dtype)
    target = np.array([7, 8])
    p = token_distributions(stored, trie, target, VOCABULARY)
    assert p.dtype == jnp.float32
    np.testing.assert_array_equal(
        p, token_distributions(stored.astype(jnp.float32), trie, target, VOCABULARY)
    )


def test_one_program_serves_all_batches():
    trie = random_catalogue(6).compress()
    arrays = DeviceTrie.of(trie)
    on_batch = jax.jit(lambda *args, beta: project(*args, beta))
    for seed in range(3):
        pair_K, node_K = decisions_of(trie, 20, 4, seed)
        logits = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 300)), jnp.float32)
        beta = jnp.float32(1 + seed)
        on_batch(logits, CFItems(), pair_K, node_K, arrays, beta=beta)
    assert on_batch._cache_size() == 1


def test_token_by_token_trie_gives_the_same_distributions():
    sequences = [[1, 2, 3, END], [1, 2, 4, END], [2, END]]
    trie = ItemTrie.build(sequences)
    logits = np.array([[0.5, -1.0, 2.0]], np.float32)
    token_mass = np.asarray(mass_of(logits, DeviceTrie.of(trie)))[0]
    forced = np.flatnonzero(trie.child_count == 1)
    np.testing.assert_array_equal(token_mass[trie.child_start[forced]], token_mass[forced])
