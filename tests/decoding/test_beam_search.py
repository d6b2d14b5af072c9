"""Beam search against exhaustive scoring of every title."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.core.trie import DeviceTrie, ItemTrie, TrieSizes
from tca4rec_jax.decoding import search_sizes
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig

SEQUENCES = oracle.with_end(oracle.WORDS)
TRIE = ItemTrie.build(SEQUENCES)
BATCH = 4
TOKENS, LENGTHS = oracle.prompts(BATCH, 7)
CF_LOGITS = np.random.default_rng(1).normal(0, 3, (BATCH, len(SEQUENCES))).astype(np.float32)


@pytest.fixture(scope="module")
def decoder():
    return oracle.tiny_decoder()


def title_of(trie, leaf):
    return tuple(trie.tokens_QxL[leaf, : trie.lengths_Q[leaf]].tolist())


def expected_lists(decoder, config, weights, cf_logits=None, sequences=SEQUENCES):
    for row in range(BATCH):
        prompt = TOKENS[row, : LENGTHS[row]].tolist()
        cf_I = None if cf_logits is None else cf_logits[row]
        yield oracle.exhaustive_scores(decoder, prompt, sequences, config.mask, weights, cf_I)


def assert_exhaustive(result, expected, trie, beams):
    """The result is the whole catalogue in order of score, then nothing."""
    for leaves_M, scores_M, by_title in zip(
        result.leaves_BxM, result.scores_BxM, expected, strict=True
    ):
        count = min(beams, trie.num_leaves)
        order = sorted(by_title, key=by_title.get, reverse=True)[:count]
        assert leaves_M[count:].tolist() == [-1] * (beams - count)
        assert (scores_M[count:] == -np.inf).all()
        np.testing.assert_allclose(scores_M[:count], [by_title[t] for t in order], atol=1e-4)
        titles = [title_of(trie, leaf) for leaf in leaves_M[:count]]
        # Compare by score: two titles within the tolerance may change places.
        assert len(set(titles)) == count
        np.testing.assert_allclose(
            [by_title[t] for t in titles], [by_title[t] for t in order], atol=1e-4
        )


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
@pytest.mark.parametrize(
    ("guidance", "length_penalty"), [(0.0, 0.0), (1.0, 0.0), (50.0, 0.0), (0.0, 1.0), (1.0, 0.7)]
)
def test_enough_beams_give_the_exhaustive_order(decoder, mask, guidance, length_penalty):
    config = SearchConfig(beams=16, mask=mask, edge_chunk=2)
    weights = ScoreWeights(guidance, 1.5, 1.3, length_penalty)
    result = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, weights, config)
    expected = expected_lists(decoder, config, weights, CF_LOGITS)
    assert_exhaustive(result, expected, TRIE, 16)


def test_large_guidance_orders_as_the_cf_model(decoder):
    config = SearchConfig(beams=16)
    weights = ScoreWeights(guidance=1e4)
    result = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, weights, config)
    mass_BxQ = np.full((BATCH, TRIE.num_leaves), -np.inf)
    for item, leaf in enumerate(TRIE.leaf_of_item):
        mass_BxQ[:, leaf] = np.logaddexp(mass_BxQ[:, leaf], CF_LOGITS[:, item])
    order_BxQ = np.argsort(-mass_BxQ, axis=1)
    np.testing.assert_array_equal(result.leaves_BxM[:, : TRIE.num_leaves], order_BxQ)


def test_guidance_zero_and_no_cf_logits_are_the_same(decoder):
    config, weights = SearchConfig(beams=5), ScoreWeights(guidance=0.0)
    with_cf = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, weights, config)
    without = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, None, weights, config)
    np.testing.assert_array_equal(with_cf.leaves_BxM, without.leaves_BxM)
    np.testing.assert_array_equal(with_cf.scores_BxM, without.scores_BxM)


def test_calls_of_every_size_find_the_same(decoder, monkeypatch):
    """Also of so few tokens that users wait for the next call."""
    weights = ScoreWeights(guidance=0.5)
    args = decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, weights
    expected = oracle.run_search(*args, SearchConfig(beams=5))
    assert len(search_sizes.call_sizes(BATCH, 5, 8)) == 1
    monkeypatch.setattr(search_sizes, "FEWEST_TOKENS", 1)
    assert search_sizes.call_sizes(BATCH, 5, 4) == [(3, 2), (8, 4), (15, 6), (25, 10)]
    found = oracle.run_search(*args, SearchConfig(beams=5, edge_chunk=4))
    np.testing.assert_array_equal(found.leaves_BxM, expected.leaves_BxM)
    np.testing.assert_allclose(found.scores_BxM, expected.scores_BxM, atol=1e-5)


def test_a_large_vocabulary_is_scored_in_pieces(decoder, monkeypatch):
    args = decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, ScoreWeights()
    config = SearchConfig(beams=5, mask="after_softmax")
    expected = oracle.run_search(*args, config)
    monkeypatch.setattr(search_sizes, "VOCABULARY_BYTES", 4 * 3 * decoder.config.vocab_size)
    assert search_sizes.states_at_once(40, decoder.config.vocab_size) == 3
    oracle._search.clear_cache()
    found = oracle.run_search(*args, config)
    np.testing.assert_array_equal(found.leaves_BxM, expected.leaves_BxM)
    np.testing.assert_allclose(found.scores_BxM, expected.scores_BxM, atol=1e-5)
    monkeypatch.setattr(search_sizes, "VOCABULARY_BYTES", 1)
    assert search_sizes.states_at_once(40, decoder.config.vocab_size) == 1


def plain_search(by_prefix, beams, penalty):
    """Beam search without an early end: {prefix: {child prefix or finished title: total}}."""
    live, finished = [((), 0.0)], []
    while live:
        candidates = [c for prefix, _ in live for c in by_prefix[prefix].items()]
        finished += [(t, s / len(t) ** penalty) for t, s in candidates if t not in by_prefix]
        live = [c for c in candidates if c[0] in by_prefix]
        live = sorted(live, key=lambda c: -c[1])[:beams]
    return sorted(finished, key=lambda c: -c[1])[:beams]


def decision_search(by_prefix, beams, penalty):
    """The same, but what is forced after a decision is read at once, before the next one."""

    def read_on(prefix, total):
        while prefix in by_prefix and len(by_prefix[prefix]) == 1:
            ((prefix, total),) = by_prefix[prefix].items()
        return prefix, total

    live, finished = [((), 0.0)], []
    while live:
        # Chosen by the decided token alone: the forced ones have not been read yet.
        candidates = [
            c for prefix, total in live for c in by_prefix.get(prefix, {prefix: total}).items()
        ]
        done = [c for c in candidates if c[0] not in by_prefix]
        finished += [(t, s / len(t) ** penalty) for t, s in done]
        live = sorted((c for c in candidates if c[0] in by_prefix), key=lambda c: -c[1])[:beams]
        live = [read_on(*c) for c in live]
    return sorted(finished, key=lambda c: -c[1])[:beams]


def huggingface_search(by_prefix, beams, penalty):
    """The same with the rules of transformers' GenerationMixin._beam_search."""
    live, kept = [((), 0.0)], []
    while live:
        candidates = [c for prefix, _ in live for c in by_prefix[prefix].items()]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * beams]
        accepted = [c for c in candidates[:beams] if c[0] not in by_prefix]
        kept += [(t, s / len(t) ** penalty) for t, s in accepted]
        kept = sorted(kept, key=lambda c: -c[1])[:beams]
        live = [c for c in candidates if c[0] in by_prefix][:beams]
        if live and len(kept) == beams:
            prefix, total = live[0]
            if total / len(prefix) ** penalty <= kept[-1][1]:
                break
    return kept


def prefix_totals(decoder, row):
    """{prefix: {longer by one token: summed log-probability}} after one row's prompt."""
    prefixes = {tuple(s[:t]) for s in SEQUENCES for t in range(1, len(s) + 1)}
    # Every prefix scored as a title of its own.
    total = oracle.exhaustive_scores(
        decoder,
        TOKENS[row, : LENGTHS[row]].tolist(),
        sorted(map(list, prefixes)),
        "after_softmax",
        ScoreWeights(),
    )
    by_prefix = {p: {} for p in {()} | prefixes if p[-1:] != (oracle.END,)}
    for prefix in prefixes:
        by_prefix[prefix[:-1]][prefix] = total[prefix]
    return by_prefix


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("rules", "reference"), [("exact", decision_search), ("huggingface", huggingface_search)]
)
def test_few_beams_search_as_a_plain_loop(decoder, rules, reference, beams):
    config = SearchConfig(beams=beams, mask="after_softmax", rules=rules)
    for penalty in (0.0, 1.0):
        weights = ScoreWeights(length_penalty=penalty)
        result = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, None, weights, config)
        for row in range(BATCH):
            expected = reference(prefix_totals(decoder, row), beams, penalty)
            leaves = [leaf for leaf in result.leaves_BxM[row] if leaf >= 0]
            assert [title_of(TRIE, leaf) for leaf in leaves] == [t for t, _ in expected]
            np.testing.assert_allclose(
                result.scores_BxM[row, : len(leaves)], [s for _, s in expected], atol=1e-4
            )


def test_the_two_rules_differ():
    # Two titles of one token, a prefix that is a little less likely than both but shared by
    # titles that are certain: 'huggingface' drops a title that finishes third of its step.
    totals = {
        (): {(1, 0): -1.0, (2,): -0.6, (3,): -0.9},
        (2,): {(2, 0): -5.0},
        (3,): {(3, 0): -0.9},
    }
    assert [t for t, _ in plain_search(totals, 2, 0.0)] == [(3, 0), (1, 0)]
    assert [t for t, _ in huggingface_search(totals, 2, 0.0)] == [(3, 0), (2, 0)]


def test_forced_tokens_cost_no_call_of_the_model(decoder):
    sequences = oracle.with_end([[1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 5, 6]])  # one decision, at once
    trie = ItemTrie.build(sequences)
    result = oracle.run_search(
        decoder, trie, TOKENS, LENGTHS, None, ScoreWeights(), SearchConfig(beams=2)
    )
    assert int(result.calls) == 0
    np.testing.assert_allclose(np.exp(result.scores_BxM).sum(axis=1), 1, rtol=1e-5)


def test_search_ends_when_no_hypothesis_can_enter_the_result(decoder):
    exhaustive = SearchConfig(beams=16, edge_chunk=1)
    greedy = SearchConfig(beams=1, edge_chunk=1)
    # The CF model makes the short title [9] all but certain: one beam is done after the prompt and
    # one step, while the exhaustive search walks the long edges as well.
    cf_logits = np.zeros_like(CF_LOGITS)
    cf_logits[:, 6] = 60.0
    weights = ScoreWeights(guidance=5.0)
    few = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, cf_logits, weights, greedy)
    many = oracle.run_search(decoder, TRIE, TOKENS, LENGTHS, cf_logits, weights, exhaustive)
    assert (few.leaves_BxM[:, 0] == TRIE.leaf_of_item[6]).all()
    assert int(few.calls) < int(many.calls)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
@pytest.mark.parametrize(
    "sequences",
    [
        [[3, 4, oracle.END]],
        [[3, 4, oracle.END]] * 3,  # one title
        [[3, oracle.END], [3, 4, oracle.END]],  # the one begins the other
    ],
)
def test_catalogues_smaller_than_the_beams(decoder, mask, sequences):
    trie = ItemTrie.build(sequences)
    config, weights = SearchConfig(beams=3, mask=mask), ScoreWeights(guidance=1.0)
    cf_logits = np.ones((BATCH, len(sequences)), np.float32)
    result = oracle.run_search(decoder, trie, TOKENS, LENGTHS, cf_logits, weights, config)
    expected = expected_lists(decoder, config, weights, cf_logits, sequences)
    assert_exhaustive(result, expected, trie, 3)


NODES, TOKENS_OF_TITLES, CHOICES, LONGEST = 64, 64, 6, 6
words = st.lists(st.lists(st.integers(1, 5), max_size=LONGEST - 1), min_size=1, max_size=10)


def padded(trie):
    """A DeviceTrie with arrays and sizes that every small trie fits: one compilation."""
    lengths = {"edge_tokens": TOKENS_OF_TITLES, "choice": CHOICES}
    names = [field.name for field in dataclasses.fields(trie) if field.name != "sizes"]

    def grow(name):
        array = getattr(trie, name)
        return jnp.pad(array, (0, lengths.get(name, NODES) - array.shape[0]))

    sizes = TrieSizes(
        num_leaves=0,  # asked for by guidance and filters only, as are the levels
        level_offsets=(0,),
        root_children=6,
        inner_children=6,
        longest_run=LONGEST,
        longest_path=LONGEST,
        beam_reads=LONGEST,
    )
    return DeviceTrie(**{name: grow(name) for name in names}, sizes=sizes)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
@settings(max_examples=8, deadline=None)
@given(words=words, length_penalty=st.sampled_from([0.0, 1.0]))
def test_random_tries_match_exhaustive_scoring(decoder, mask, words, length_penalty):
    sequences = oracle.with_end(words)
    trie = ItemTrie.build(sequences)
    config = SearchConfig(beams=10, mask=mask, edge_chunk=2)
    weights = ScoreWeights(length_penalty=length_penalty)
    device_trie = padded(config.device_trie(trie))
    result = oracle.run_search(
        decoder, trie, TOKENS, LENGTHS, None, weights, config, device_trie=device_trie
    )
    assert_exhaustive(result, expected_lists(decoder, config, weights, None, sequences), trie, 10)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
@settings(max_examples=12, deadline=None)
@given(allowed=st.lists(st.booleans(), min_size=14, max_size=14).filter(any))
def test_items_left_out_match_exhaustive_scoring_of_the_others(decoder, mask, allowed):
    kept = np.flatnonzero(allowed)
    sequences, cf_logits = [SEQUENCES[item] for item in kept], CF_LOGITS[:, kept]
    config, weights = SearchConfig(beams=10, mask=mask, edge_chunk=2), ScoreWeights(0.5)
    result = oracle.run_search(
        decoder, TRIE, TOKENS, LENGTHS, CF_LOGITS, weights, config,
        allowed_BxI=np.tile(allowed, (BATCH, 1)),
    )  # fmt: skip
    expected = list(expected_lists(decoder, config, weights, cf_logits, sequences))
    for leaves_M, scores_M, by_title in zip(
        result.leaves_BxM, result.scores_BxM, expected, strict=True
    ):
        found = [title_of(TRIE, leaf) for leaf in leaves_M if leaf >= 0]
        assert set(found) <= set(by_title)
        assert len(set(found)) == len(found) == min(10, len(by_title))
        best = sorted(by_title.values(), reverse=True)[: len(found)]
        np.testing.assert_allclose(scores_M[: len(found)], best, atol=1e-4)
        np.testing.assert_allclose([by_title[title] for title in found], best, atol=1e-4)


def test_unusable_settings_are_errors():
    with pytest.raises(ValueError, match="mask is 'during_softmax': expected one of"):
        SearchConfig(mask="during_softmax")
    with pytest.raises(ValueError, match="rules is 'loose'"):
        SearchConfig(rules="loose")
    with pytest.raises(ValueError, match="at least 1"):
        SearchConfig(beams=0)
    with pytest.raises(ValueError, match="temperature is 0.0: expected 0.000001 to"):
        ScoreWeights(temperature=0.0).check()
    with pytest.raises(ValueError, match="guidance"):
        ScoreWeights(guidance=-1.0).check()
