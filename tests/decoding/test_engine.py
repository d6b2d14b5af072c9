"""Rows in batches over two devices against one search per row."""

import itertools
from functools import partial

import jax
import numpy as np
import oracle
import pytest
from flax import nnx

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding import search_sizes
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.likelihood import scored_titles
from tca4rec_jax.decoding.results import Recommendations, ResultsFile
from tca4rec_jax.decoding.search_programs import (
    SearchProgram,
    TextBatch,
    Users,
    read_prefix,
    read_prompts,
    search_batch,
)
from tca4rec_jax.distributed.sharding import make_mesh, put, replicated, shard_batch
from tca4rec_jax.fileio import write_npz
from tca4rec_jax.llm.decoder import Decoder

SEQUENCES = oracle.with_end(oracle.WORDS)
TRIE = ItemTrie.build(SEQUENCES)
CONFIG = SearchConfig(beams=5, edge_chunk=2)


@pytest.fixture(scope="module")
def decoder():
    return oracle.tiny_decoder()


def ragged_prompts(rows, length):
    tokens, lengths = oracle.prompts(rows, length, seed=3)
    return Ragged.from_lengths(tokens[np.arange(length) < lengths[:, None]], lengths)


def test_leaves_become_items_in_catalogue_order():
    def by_leaf(leaf):
        return np.flatnonzero(TRIE.leaf_of_item == leaf).tolist()

    rng = np.random.default_rng(0)
    leaves_RxM = np.stack([rng.permutation(TRIE.num_leaves)[:6] for _ in range(9)])
    leaves_RxM[2, 3:] = -1
    leaves_RxM[4, :] = -1
    items_RxK = Recommendations(leaves_RxM, None, None).items(TRIE, 7)
    for leaves_M, items_K in zip(leaves_RxM, items_RxK, strict=True):
        expected = [item for leaf in leaves_M if leaf >= 0 for item in by_leaf(leaf)]
        assert items_K.tolist() == (expected + [-1] * 7)[:7]
    assert any(len(by_leaf(leaf)) > 1 for leaf in range(TRIE.num_leaves))


def padded_tokens(lengths_R, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths_R)


def test_buckets_hold_every_row_with_the_least_padding():
    lengths_R = np.array([3, 17, 20, 40, 41, 100])
    assert bucket_lengths(lengths_R, 1).tolist() == [104]
    assert bucket_lengths(np.array([5, 5, 5]), 3).tolist() == [8]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths_R = rng.integers(1, 90, 12)
        widths = np.unique(-(-lengths_R // 8) * 8)
        for count in (1, 2, 3):
            chosen = bucket_lengths(lengths_R, count)
            assert len(chosen) <= count
            choices = itertools.combinations(widths, min(count, len(widths)))
            least = min(padded_tokens(lengths_R, c) for c in choices if c[-1] == widths[-1])
            assert padded_tokens(lengths_R, chosen) == least


def test_rows_in_sharded_buckets_equal_rows_on_their_own(decoder):
    rows = 11  # two buckets with a last batch that is not full
    prompts = ragged_prompts(rows, 30)
    cf_RxI = np.random.default_rng(1).normal(size=(rows, len(SEQUENCES))).astype(np.float32)
    weights = ScoreWeights(guidance=0.7)
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=2)
    result = search.recommend(
        decoder, SearchRows(prompts, cf_RxI.__getitem__), weights, progress=None
    )
    tokens = prompts.pad(np.arange(rows), 30, 0)
    single = oracle.run_search(
        decoder, TRIE, tokens, prompts.lengths.astype(np.int32), cf_RxI, weights, CONFIG
    )
    np.testing.assert_array_equal(result.leaves_RxM, single.leaves_BxM)
    np.testing.assert_allclose(result.scores_RxM, single.scores_BxM, atol=1e-4)


def test_the_search_is_split_over_the_devices_without_communication(decoder):
    mesh = make_mesh(2)
    prompts = ragged_prompts(8, 12)
    tokens, lengths = prompts.pad(np.arange(8), 12, 0), prompts.lengths.astype(np.int32)
    cf_logits = np.random.default_rng(2).normal(size=(8, len(SEQUENCES))).astype(np.float32)
    graph, state = nnx.split(decoder)
    titles, scored = scored_titles(TRIE, np.arange(8), CONFIG)
    weights = ScoreWeights(0.5, 1.0, 1.0, 0.0)
    tokens_BxS = prompts.followed_by(titles).pad(np.arange(8), 24, 0)
    texts, users = shard_batch(mesh, (TextBatch(tokens_BxS, lengths, scored), Users(cf_logits)))
    state, trie = put((state, CONFIG.device_trie(TRIE)), replicated(mesh))
    program, compiled_texts = SearchProgram(mesh, graph, CONFIG), []

    def run(function, *args, **more):
        compiled = function.lower(*args, program=program, **more).compile()
        compiled_texts.append(compiled.as_text())
        return compiled(*args)

    prompts, nll = run(read_prompts, state, texts, None, trie, np.ones(1, np.float32), capacity=24)
    scalars = ScoreWeights(*map(np.float32, weights))
    leaves, scores = run(search_batch, state, prompts, users, DENSE, trie, scalars)
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in "".join(compiled_texts)
    assert nll.shape == (8, 1)
    assert [shard.data.shape for shard in leaves.addressable_shards] == [(4, 5), (4, 5)]
    alone = oracle.run_search(decoder, TRIE, tokens, lengths, cf_logits, weights, CONFIG)
    np.testing.assert_array_equal(leaves, alone.leaves_BxM)
    np.testing.assert_allclose(scores, alone.scores_BxM, atol=1e-5)


def test_a_sweep_equals_its_searches_one_by_one(decoder):
    prompts = ragged_prompts(4, 12)
    cf_RxI = np.random.default_rng(3).normal(size=(4, len(SEQUENCES))).astype(np.float32)
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=1)
    sweep = [ScoreWeights(guidance=value) for value in (0.0, 1.0, 100.0)]
    rows = SearchRows(prompts, cf_RxI.__getitem__)
    (found,) = search.sweep([(decoder, sweep)], rows, progress=None)
    for weights, one in zip(sweep, found, strict=True):
        alone = search.recommend(decoder, rows, weights, progress=None)
        np.testing.assert_array_equal(one.leaves_RxM, alone.leaves_RxM)
        np.testing.assert_allclose(one.scores_RxM, alone.scores_RxM, rtol=1e-5)
    assert (found[0].leaves_RxM != found[2].leaves_RxM).any()


def test_cf_vectors_are_multiplied_out_on_the_devices(decoder):
    """Vectors and items, from the host or a device, guide as the dense logits do."""
    rng, rows = np.random.default_rng(8), 6
    prompts = ragged_prompts(rows, 12)
    cf_RxD, table_IxD = rng.normal(size=(rows, 4)), rng.normal(size=(len(SEQUENCES), 4))
    cf_RxD, table_IxD = cf_RxD.astype(np.float32), table_IxD.astype(np.float32)
    bias_I = rng.normal(size=len(SEQUENCES)).astype(np.float32)
    dense_RxI = cf_RxD @ table_IxD.T + bias_I
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=1)
    items = CFItems(table_IxD, bias_I)
    expected, *found = (
        search.recommend(decoder, rows, ScoreWeights(guidance=1.0), progress=None)
        for rows in (
            SearchRows(prompts, dense_RxI.__getitem__),
            SearchRows(prompts, cf_RxD.__getitem__, items),
            SearchRows(prompts, jax.numpy.asarray(cf_RxD).__getitem__, items),
            SearchRows(prompts, dense_RxI.__getitem__),
        )
    )
    for one in found:
        np.testing.assert_array_equal(one.leaves_RxM, expected.leaves_RxM)
        np.testing.assert_allclose(one.scores_RxM, expected.scores_RxM, rtol=1e-5, atol=1e-5)
    assert search.put_items(items) is search.of_sizes(search.sizes(np.ones(1))).put_items(items)


def test_models_that_share_layers_find_what_each_finds_alone(decoder, monkeypatch):
    """One is guided, the other is not; both are asked for the targets' likelihood."""
    graph, state = nnx.split(decoder)
    layers = jax.tree.map(lambda leaf: leaf.at[1:].multiply(1.5), state["layers"])
    other = nnx.merge(graph, nnx.State(dict(state) | {"layers": layers}))
    rows = 6
    prompts = ragged_prompts(rows, 12)
    cf_RxI = np.random.default_rng(4).normal(size=(rows, len(SEQUENCES))).astype(np.float32)
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=1)
    jobs = [
        (decoder, [ScoreWeights()]),
        (other, [ScoreWeights(), ScoreWeights(guidance=1.0)]),
    ]
    search_rows = SearchRows(prompts, cf_RxI.__getitem__, target_R=np.arange(rows))
    together = search.sweep(jobs, search_rows, frozen_prefix=1, progress=None)
    for job, of_job in zip(jobs, together, strict=True):
        (of_job_alone,) = search.sweep([job], search_rows, progress=None)
        for found, alone in zip(of_job, of_job_alone, strict=True):
            np.testing.assert_allclose(found.nll_RxT, alone.nll_RxT, rtol=1e-5)
            np.testing.assert_array_equal(found.leaves_RxM, alone.leaves_RxM)
            np.testing.assert_allclose(found.scores_RxM, alone.scores_RxM, rtol=1e-5)
    assert np.abs(together[0][0].nll_RxT - together[1][0].nll_RxT).min() > 0.01
    # One row after the other, as a CPU reads a few of many.
    monkeypatch.setattr(search_sizes, "TEXT_TOKENS", 1)
    for program in (read_prefix, read_prompts):
        program.clear_cache()
    in_groups = search.sweep(jobs, search_rows, frozen_prefix=1, progress=None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), in_groups, together)


def test_an_interrupted_sweep_goes_on_from_its_file(decoder, tmp_path):
    rows, seen = 10, []
    prompts = ragged_prompts(rows, 12)
    cf_RxI = np.random.default_rng(7).normal(size=(rows, len(SEQUENCES))).astype(np.float32)
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=1)
    jobs = [(decoder, [ScoreWeights(guidance=value) for value in (0.0, 1.0)])]

    def sweep(identity, stop_after=None):
        seen.clear()

        def cf_logits(rows_B):
            if len(seen) == stop_after:
                raise KeyboardInterrupt
            seen.append(rows_B)
            return cf_RxI[rows_B]

        search_rows = SearchRows(prompts, cf_logits, target_R=np.arange(rows))
        file = ResultsFile(tmp_path / "sweep.npz", identity, every_seconds=0)
        return search.sweep(jobs, search_rows, file=file, progress=None)[0]

    whole = sweep("another")
    assert len(seen) == 3
    with pytest.raises(KeyboardInterrupt):
        sweep("one", stop_after=2)  # of the two batches that ran, one was fetched
    resumed = sweep("one")
    assert len(seen) == 2
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_the_likelihood_of_targets_equals_exhaustive_scoring(decoder, mask, monkeypatch):
    rows = 2 * len(SEQUENCES)  # every title, after prompts of several lengths
    prompts = ragged_prompts(rows, 12)
    target_R = np.arange(rows) % len(SEQUENCES)
    config = SearchConfig(beams=3, mask=mask)
    search = BatchedSearch(TRIE, config, mesh=make_mesh(2), batch_size=6, buckets=2)
    temperatures, jobs = (1.0, 2.5), [(decoder, [ScoreWeights()])]

    def sweep(target_R):
        search_rows = SearchRows(prompts, target_R=target_R)
        return search.sweep(jobs, search_rows, temperatures=temperatures, progress=None)[0][0]

    found = sweep(target_R)
    for row in range(rows):
        expected = [
            -oracle.exhaustive_scores(
                decoder, prompts[row].tolist(), SEQUENCES, mask, ScoreWeights(temperature=t)
            )[tuple(SEQUENCES[target_R[row]])]
            for t in temperatures
        ]
        np.testing.assert_allclose(found.nll_RxT[row], expected, rtol=1e-4, atol=1e-4)
    # The scores of the search are the likelihoods of what it found.
    again = sweep(found.items(TRIE, 1)[:, 0])
    np.testing.assert_allclose(-again.nll_RxT[:, 0], found.scores_RxM[:, 0], rtol=1e-4, atol=1e-4)
    # As many positions at once as memory allows: one, two, all of them.
    for logits in (1, 2 * 3 * oracle.VOCABULARY):
        with monkeypatch.context() as patch:
            patch.setattr(search_sizes, "VOCABULARY_BYTES", 4 * logits)
            read_prompts.clear_cache()
            np.testing.assert_allclose(sweep(target_R).nll_RxT, found.nll_RxT, rtol=1e-6)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_items_left_out_are_as_if_the_catalogue_had_never_held_them(decoder, mask):
    rows = 6
    prompts = ragged_prompts(rows, 12)
    rng = np.random.default_rng(5)
    cf_RxI = rng.normal(size=(rows, len(SEQUENCES))).astype(np.float32)
    # [1, 2, 3] and [9] lose one of their items, [1, 2], [10, 11, 12] and [2, 2, 2, 2, 2] all.
    left_out = [0, 3, 6, 7, 11]
    allowed_I = ~np.isin(np.arange(len(SEQUENCES)), left_out)
    kept = np.flatnonzero(allowed_I)
    smaller = ItemTrie.build([SEQUENCES[item] for item in kept])
    weights, config = ScoreWeights(guidance=0.7), SearchConfig(beams=6, mask=mask)

    def recommend(trie, cf_RxI, **kwargs):
        search = BatchedSearch(trie, config, mesh=make_mesh(2), batch_size=6, buckets=1)
        search_rows = SearchRows(prompts, cf_RxI.__getitem__, **kwargs)
        return search.recommend(decoder, search_rows, weights, progress=None)

    allowed_RxI = np.tile(allowed_I, (rows, 1))
    found = recommend(TRIE, cf_RxI, allowed=allowed_RxI.__getitem__)
    expected = recommend(smaller, cf_RxI[:, kept])
    np.testing.assert_allclose(found.scores_RxM, expected.scores_RxM, atol=1e-4)
    np.testing.assert_array_equal(
        found.items(TRIE, 6, allowed_RxI.__getitem__), kept[expected.items(smaller, 6)]
    )
    # A row of its own: only one title is left for it.
    allowed_RxI[0] = np.arange(len(SEQUENCES)) == 5
    alone = recommend(TRIE, cf_RxI, allowed=allowed_RxI.__getitem__)
    assert alone.items(TRIE, 3, allowed_RxI.__getitem__)[0].tolist() == [5, -1, -1]
    np.testing.assert_array_equal(alone.leaves_RxM[1:], found.leaves_RxM[1:])


def test_nothing_is_compiled_after_every_bucket_was_met(decoder):
    """Other prompts, weights, guidance and numbers of rows; the search is compiled once for all."""
    cf_RxI = np.random.default_rng(6).normal(size=(9, len(SEQUENCES))).astype(np.float32)
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=(8, 16))
    graph, state = nnx.split(decoder)
    other = nnx.merge(graph, jax.tree.map(lambda value: value * 1.5, state))

    def run(decoder, prompts, guidance, search=search):
        weights = ScoreWeights(guidance=guidance)
        rows = SearchRows(prompts, cf_RxI.__getitem__)
        search.recommend(decoder, rows, weights, progress=None)
        return read_prompts._cache_size(), search_batch._cache_size()

    longest, shorter = ragged_prompts(9, 16), ragged_prompts(9, 8)
    first = run(decoder, longest, 0.5)
    warm = run(decoder, shorter, 0.5)
    assert warm == first, "some of the longest rows were as short"
    assert run(other, longest, 2.0) == warm
    assert run(decoder, ragged_prompts(5, 12), 0.1) == warm
    wider = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(2), batch_size=4, buckets=(8, 40))
    assert run(decoder, longest, 0.5, wider)[1] == warm[1] + 1


def test_no_rows_give_no_recommendations(decoder):
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(1), batch_size=2)
    nothing = Ragged.from_lengths(np.zeros(0, np.int32), np.zeros(0, np.int64))
    assert search.recommend(decoder, SearchRows(nothing), progress=None).leaves_RxM.shape == (0, 5)


def test_what_cannot_be_recommended_from_is_an_error(decoder):
    mesh = make_mesh(2)
    with pytest.raises(ValueError, match="batch_size is 3"):
        BatchedSearch(TRIE, CONFIG, mesh=mesh, batch_size=3)
    with pytest.raises(ValueError, match="at least one bucket"):
        BatchedSearch(TRIE, CONFIG, mesh=mesh, buckets=())
    search = BatchedSearch(TRIE, CONFIG, mesh=mesh, buckets=(8,))
    prompts = Ragged.from_lengths(np.ones(12, np.int32), np.array([3, 9]))
    with pytest.raises(ValueError, match=r"row 1: a prompt of 9 tokens, expected 1\.\.8"):
        search.recommend(decoder, SearchRows(prompts))
    longest = np.argmax(list(map(len, SEQUENCES)))
    prompt = Ragged.from_lengths(np.ones(8, np.int32), np.array([8]))
    with pytest.raises(ValueError, match=r"row 0: a prompt of 8 tokens, expected 1\.\.[1-7] "):
        search.sweep(  # the title is read after the prompt
            [(decoder, [ScoreWeights()])], SearchRows(prompt, target_R=np.array([longest]))
        )
    with pytest.raises(ValueError, match="no CF logits"):
        search.recommend(decoder, SearchRows(prompts), ScoreWeights(guidance=1.0))


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
@pytest.mark.parametrize(
    "broken",
    [
        {"final_norm": 0},
        {"embedding": 9},  # a token inside titles and of some prompts
        {"layers/q_proj": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error_that_names_the_row(decoder, mask, broken, value):
    params, _ = decoder.arrays()
    ((path, at),) = broken.items()
    params = params | {path: params[path].at[at].set(value)}
    search = BatchedSearch(TRIE, SearchConfig(beams=5, mask=mask), mesh=make_mesh(1), batch_size=2)
    prompts = Ragged.from_lengths(np.array([1, 2, 3, 1], np.int32), np.array([2, 2]))
    with pytest.raises(FloatingPointError, match="row 0: the LLM's scores are not finite"):
        search.recommend(Decoder(decoder.config, params), SearchRows(prompts), progress=None)


def test_a_token_beyond_the_vocabulary_is_an_error_that_names_the_row(decoder):
    beyond = [*SEQUENCES, [1, oracle.VOCABULARY, oracle.END]]
    search = BatchedSearch(ItemTrie.build(beyond), CONFIG, mesh=make_mesh(1), batch_size=2)
    prompts = Ragged.from_lengths(np.array([1, 2], np.int32), np.array([1, 1]))
    with pytest.raises(FloatingPointError, match="row 0: .*not in its vocabulary"):
        search.recommend(decoder, SearchRows(prompts), progress=None)


def test_damaged_results_are_made_anew(tmp_path, caplog):
    path, results = tmp_path / "unfinished.npz", (np.zeros((2, 3)), np.zeros(2))
    ResultsFile(path, "one", every_seconds=0).write((np.ones((2, 3)), np.ones(2)), np.ones(2, bool))
    content = path.read_bytes()
    for cut in (0, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert not ResultsFile(path, "one").read(results).any()
        assert not any(array.any() for array in results)
        assert "unfinished.npz: not a readable .npz file" in caplog.text
        caplog.clear()
    write_npz(path, identity="one", done_R=np.ones(2, bool))
    assert not ResultsFile(path, "one").read(results).any()
    path.write_bytes(content)
    assert ResultsFile(path, "one").read(results).all()
    assert all(array.all() for array in results)
