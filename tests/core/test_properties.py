"""Properties of trie, projection and objective over random catalogues, against brute force.

The catalogues are small and of few tokens, so titles that are prefixes of others, titles that two
items share, empty titles (the end token alone) and catalogues of one item all occur.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tca4rec_jax.core.collaborative_tokenizer import CFItems, project
from tca4rec_jax.core.losses import SoftLabels, children_loss_of_logits, vocabulary_loss_of_logits
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged

END, VOCABULARY = 0, 5
MOST_ITEMS, MOST_TOKENS = 8, 5

titles = st.lists(st.integers(1, VOCABULARY - 1), max_size=MOST_TOKENS - 1)
catalogues = st.lists(titles, min_size=1, max_size=MOST_ITEMS).map(
    lambda titles: [(*title, END) for title in titles]
)
# Eighths are exact in float32 and float16, so sums of a logit and a whole number are too.
logits_of_an_item = st.integers(-480, 480).map(lambda eighths: eighths / 8)
seeds = st.integers(0, 2**31 - 1)

ONE_ITEM, ONE_TITLE, PREFIXES = [(1, END)], [(END,)] * 3, [(END,), (1, END), (1, 1, END)]


def over_catalogues(max_examples, *strategies):
    """Runs a test over random catalogues, and over the extreme ones if it takes nothing else."""

    def decorate(test):
        test = given(catalogues, *strategies)(test)
        if not strategies:
            for catalogue in (ONE_ITEM, ONE_TITLE, PREFIXES):
                test = example(catalogue)(test)
        return settings(max_examples=max_examples, deadline=None)(test)

    return decorate


def next_tokens(sequences):
    """Every proper prefix -> its sorted next tokens."""
    children = {}
    for sequence in sequences:
        for t, token in enumerate(sequence):
            children.setdefault(sequence[:t], set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def items_below(sequences, prefix):
    return [i for i, sequence in enumerate(sequences) if sequence[: len(prefix)] == prefix]


def prefix_of(trie, node):
    return tuple(trie.tokens_QxL[trie.leaf_start[node], : trie.depth[node]].tolist())


def children_of(trie, node):
    return np.arange(trie.child_start[node], trie.child_start[node] + trie.child_count[node])


def assert_equal_tries(left, right):
    for field in dataclasses.fields(ItemTrie):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)


# The trie


@over_catalogues(100)
def test_inner_nodes_are_the_prefixes_and_compressed_the_decisions(sequences):
    trie = ItemTrie.build(sequences)
    prefixes = next_tokens(sequences)
    decisions = {p for p, tokens in prefixes.items() if len(tokens) > 1 or not p}
    for nodes, expected in ((trie, set(prefixes)), (trie.compress(), decisions)):
        inner = np.flatnonzero(nodes.child_count).tolist()
        assert sorted(prefix_of(nodes, n) for n in inner) == sorted(expected)
        for n in inner:
            children = children_of(nodes, n)
            assert (nodes.parent[children] == n).all()
            assert nodes.token[children].tolist() == prefixes[prefix_of(nodes, n)]


@over_catalogues(100)
def test_leaves_are_the_distinct_titles_and_ranges_of_them_are_nested(sequences):
    trie = ItemTrie.build(sequences)
    for nodes in (trie, trie.compress()):
        leaves = np.flatnonzero(nodes.child_count == 0)
        assert sorted(prefix_of(nodes, n) for n in leaves) == sorted(set(sequences))
        assert (nodes.leaf_start[leaves] + 1 == nodes.leaf_stop[leaves]).all()
        assert (nodes.leaf_start[0], nodes.leaf_stop[0]) == (0, nodes.num_leaves)
        for n in range(nodes.num_nodes):
            start, stop = nodes.leaf_start[n], nodes.leaf_stop[n]
            below = sorted(nodes.items_by_leaf.take(np.arange(start, stop)).values)
            assert below == items_below(sequences, prefix_of(nodes, n))
            if nodes.child_count[n]:  # the children's ranges partition the node's
                children = children_of(nodes, n)
                bounds = [start, *nodes.leaf_stop[children]]
                assert bounds == [*nodes.leaf_start[children], stop]


@over_catalogues(100)
def test_the_path_of_an_item_spells_its_tokens(sequences):
    trie = ItemTrie.build(sequences)
    for nodes in (trie, trie.compress()):
        for i, sequence in enumerate(sequences):
            path = nodes.paths_QxK[nodes.leaf_of_item[i]]
            path = path[path >= 0]
            assert path[0] == 0
            assert (nodes.parent[path[1:]] == path[:-1]).all()
            assert nodes.leaf[path[-1]] == nodes.leaf_of_item[i]
            assert nodes.edge_tokens.take(path).values.tolist() == list(sequence)


@over_catalogues(100)
def test_flat_tokens_build_the_same_trie(sequences):
    flat = np.array([token for sequence in sequences for token in sequence], np.int32)
    ragged = Ragged.from_lengths(flat, [len(sequence) for sequence in sequences])
    assert_equal_tries(ItemTrie.build(ragged), ItemTrie.build(sequences))


# The projection


def brute_force(sequences, logits_I, beta=1.0):
    """{(prefix, token): p_cf(token | prefix)} in float64, from the definition."""
    logits_I = np.asarray(logits_I, np.float64) / beta
    p = {}
    for prefix, tokens in next_tokens(sequences).items():
        below = items_below(sequences, prefix)
        q = np.exp(logits_I[below] - logits_I[below].max())
        q /= q.sum()
        for token in tokens:
            leads = [sequences[i][len(prefix)] == token for i in below]
            p[prefix, token] = q[leads].sum()
    return p


_project = jax.jit(project)


def projected(sequences, logits_PxI, beta=1.0, compress=False):
    """{(prefix, token): p_cf [P]} at every inner node, by `project`; 0 where there is no child."""
    trie = ItemTrie.build(sequences)
    trie = trie.compress() if compress else trie
    inner = np.flatnonzero(trie.child_count)
    pairs = len(logits_PxI)
    log_p_KxC = _project(
        jnp.asarray(logits_PxI),
        CFItems(),
        np.repeat(np.arange(pairs), inner.size),
        np.tile(inner, pairs),
        DeviceTrie.of(trie),
        beta,
    )
    assert log_p_KxC.dtype == jnp.float32
    child_NxC = trie.child_start[inner, None] + np.arange(trie.child_count.max())
    p_PxNxC = np.exp(np.asarray(log_p_KxC, np.float64)).reshape(pairs, *child_NxC.shape)
    exists_NxC = np.arange(trie.child_count.max()) < trie.child_count[inner, None]
    assert not p_PxNxC[:, ~exists_NxC].any()
    return {
        (prefix_of(trie, inner[n]), int(trie.token[child_NxC[n, c]])): p_PxNxC[:, n, c]
        for n, c in np.argwhere(exists_NxC)
    }


def logits_of(sequences, data, unique=False):
    """Drawn CF logits of the items, float64 [I]."""
    size = len(sequences)
    return np.array(
        data.draw(st.lists(logits_of_an_item, min_size=size, max_size=size, unique=unique))
    )


@over_catalogues(25, st.data(), st.sampled_from(["bfloat16", "float16", "float32"]), st.booleans())
def test_p_cf_is_the_definition(sequences, data, dtype, compress):
    wide_I = logits_of(sequences, data)
    best, worst = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=2, max_size=2))
    wide_I[best], wide_I[worst] = 60.0, -60.0  # some title leads to the worst item of the row
    stored_2xI = jnp.asarray([wide_I, wide_I / 8], dtype)
    p = projected(sequences, stored_2xI, compress=compress)
    for row in range(2):
        expected = brute_force(sequences, np.asarray(stored_2xI, np.float64)[row])
        sums = collections.Counter()
        for (prefix, token), p_2 in p.items():
            np.testing.assert_allclose(p_2[row], expected[prefix, token], rtol=1e-5)
            sums[prefix] += p_2[row]
        np.testing.assert_allclose(list(sums.values()), 1.0, atol=1e-6)


@over_catalogues(15, st.data(), st.integers(-30, 30), st.sampled_from([0.5, 1.0, 3.0]))
def test_order_of_items_and_a_constant_change_nothing(sequences, data, constant, beta):
    logits_I = logits_of(sequences, data) / 8
    order = data.draw(st.permutations(range(len(sequences))))
    p = projected(sequences, np.float32([logits_I, logits_I + constant]), beta)
    shuffled = projected(
        [sequences[i] for i in order], np.float32([logits_I, logits_I + constant])[:, order], beta
    )
    assert set(p) == set(shuffled)
    for key, p_2 in p.items():
        np.testing.assert_allclose(shuffled[key], p_2, rtol=1e-5)
        np.testing.assert_allclose(p_2[1], p_2[0], rtol=2e-5)


@over_catalogues(15, st.data())
def test_a_small_beta_picks_the_token_of_the_best_item(sequences, data):
    logits_I = logits_of(sequences, data, unique=True)
    p = projected(sequences, np.float32([logits_I, -logits_I]), beta=1e-3)
    for (prefix, token), p_2 in p.items():
        for row, scores_I in enumerate((logits_I, -logits_I)):
            best = max(items_below(sequences, prefix), key=scores_I.__getitem__)
            picked = sequences[best][len(prefix)] == token
            np.testing.assert_allclose(p_2[row], float(picked), atol=1e-6)


# The objective


def supervised(sequences, cf_logits_I):
    """Every token of every title as a position, and the decisions among them, padded.

    Returns:
      (label_N int32, weight_N float32, SoftLabels), with N = K = MOST_ITEMS * MOST_TOKENS and
      C = VOCABULARY.
    """
    size = MOST_ITEMS * MOST_TOKENS
    label_N, weight_N = np.zeros(size, np.int32), np.zeros(size, np.float32)
    position_K, weight_K, label_child_K = (np.zeros_like(a) for a in (label_N, weight_N, label_N))
    token_KxC = np.zeros((size, VOCABULARY), np.int32)
    log_p_KxC = np.zeros((size, VOCABULARY), np.float32)
    children, p = next_tokens(sequences), brute_force(sequences, cf_logits_I)
    places = [(sequence[:t], token) for sequence in sequences for t, token in enumerate(sequence)]
    k = 0
    for n, (prefix, token) in enumerate(places):
        label_N[n], weight_N[n] = token, 1.0
        tokens = children[prefix]
        if len(tokens) > 1:
            position_K[k], weight_K[k], label_child_K[k] = n, 1.0, tokens.index(token)
            token_KxC[k, : len(tokens)] = tokens
            log_p_KxC[k] = -np.inf
            log_p_KxC[k, : len(tokens)] = np.log([p[prefix, child] for child in tokens])
            k += 1
    absent_KxC = log_p_KxC == -np.inf
    labels = SoftLabels(position_K, weight_K, label_child_K, token_KxC, absent_KxC, log_p_KxC)
    return jax.tree.map(jnp.asarray, (label_N, weight_N, labels))


_vocabulary_loss, _children_loss = map(
    jax.jit, (vocabulary_loss_of_logits, children_loss_of_logits)
)


@pytest.mark.parametrize("form", ["log_expectation", "cross_entropy"])
@over_catalogues(30, seeds, st.sampled_from([0.5, 1.0, 4.5]))
def test_without_cf_the_objective_is_the_cross_entropy_of_optax(form, sequences, seed, tau):
    rng = np.random.default_rng(seed)
    label_N, weight_N, labels = supervised(sequences, rng.normal(0, 3, len(sequences)))
    logits_NxV = jnp.asarray(rng.normal(0, 3, (label_N.size, VOCABULARY)), jnp.float32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    plain = jnp.sum(weight_N * cross_entropy(logits_NxV / tau, label_N))
    objective = Objective(0.0, 1.0, tau, form)
    loss, nll = _vocabulary_loss(logits_NxV, label_N, weight_N, labels, objective)
    np.testing.assert_allclose([loss, nll], [plain, plain], rtol=2e-6)

    logits_KxV = logits_NxV[labels.position]
    z_KxC = jnp.take_along_axis(logits_KxV, labels.token, axis=1) / tau
    plain_K = cross_entropy(z_KxC, labels.child, where=~labels.absent)
    plain = jnp.sum(labels.weight * plain_K)
    loss, nll = _children_loss(logits_NxV, labels, objective)
    np.testing.assert_allclose([loss, nll], [plain, plain], rtol=2e-6, atol=1e-6)
