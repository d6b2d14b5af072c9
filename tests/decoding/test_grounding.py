"""Grounding against a search and distances in plain Python and NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.grounding import generate
from tca4rec_jax.decoding.search_programs import prefill_prompts
from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.errors import UserError

TRIE = ItemTrie.build(oracle.with_end(oracle.WORDS))
ITEMS, ROWS, MOST, BEAMS = len(oracle.WORDS), 7, 5, 3
CONFIG = SearchConfig(6, find="grounding", grounding_beams=BEAMS, grounding_tokens=MOST)


@pytest.fixture(scope="module")
def decoder():
    return oracle.tiny_decoder()


@functools.cache
def texts():
    tokens_RxS, lengths_R = oracle.prompts(ROWS, 6, seed=3)
    return [row[:length].tolist() for row, length in zip(tokens_RxS, lengths_R, strict=True)]


@nnx.jit
def _states(decoder, tokens, length):
    return decoder.hidden(tokens, length)


def states(decoder, tokens):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_states(decoder, padded, np.array([len(tokens)])), np.float64)[0]


def log_probs(decoder, tokens, temperature):
    head = np.asarray(decoder.embedding[...], np.float64)
    z = states(decoder, tokens)[len(tokens) - 1] @ head.T / temperature
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def free_text(decoder, prompt, temperature=1.0, penalty=0.0):
    """Beam search without a trie, every text read anew."""
    live, best = [(0.0, [])], (-np.inf, [])
    for length in range(1, MOST + 2):
        options = []
        for total, text in live:
            log_p = total + log_probs(decoder, prompt + text, temperature)
            if text:
                best = max(best, (log_p[oracle.END] / length**penalty, text))
            options += [(log_p[v], [*text, v]) for v in range(len(log_p)) if v != oracle.END]
        ranked = sorted(options, reverse=True)
        unfinished, live = live, ranked[:BEAMS]
    return best[1] if best[0] > -np.inf else unfinished[0][1]


def scaled(values):
    width = values.max() - values.min()
    return (values - values.min()) / (width or 1.0)


def grounded(decoder, text, allowed_I=None, cf_I=None, gamma=0.0):
    """{title: score} of the titles of allowed items."""
    allowed_I = np.ones(ITEMS, bool) if allowed_I is None else allowed_I
    items = [i for i in range(ITEMS) if allowed_I[i]]
    titles = sorted({tuple(oracle.WORDS[i]) for i in items})
    ours = states(decoder, text)[len(text) - 1]
    theirs = np.stack([states(decoder, list(t))[len(t) - 1] for t in titles])
    distance = scaled(np.linalg.norm(theirs - ours, axis=1))
    if cf_I is not None:
        best = [max(cf_I[i] for i in items if tuple(oracle.WORDS[i]) == t) for t in titles]
        distance = distance * (1 + scaled(np.array(best))) ** -gamma
    return dict(zip(titles, -distance, strict=True))


def found(decoder, config=CONFIG, weights=ScoreWeights(), mesh=2, **rows):  # noqa: B008
    search = BatchedSearch(TRIE, config, mesh=make_mesh(mesh), batch_size=4, buckets=2)
    prompts = Ragged.from_lengths(np.concatenate(texts()), np.array(list(map(len, texts()))))
    return search.recommend(decoder, SearchRows(prompts, **rows), weights, progress=None)


def check(result, expected_of_row):
    for row in range(ROWS):
        expected = expected_of_row(row)
        leaves = [leaf for leaf in result.leaves_RxM[row].tolist() if leaf >= 0]
        titles = [tuple(TRIE.tokens_QxL[q, : TRIE.lengths_Q[q] - 1].tolist()) for q in leaves]
        assert len(titles) == len({*titles}) == min(CONFIG.beams, len(expected))
        scores = result.scores_RxM[row, : len(titles)]
        np.testing.assert_allclose(scores, [expected[t] for t in titles], atol=2e-5)
        best = sorted(expected.values(), reverse=True)[: len(titles)]
        np.testing.assert_allclose(scores, best, atol=2e-5)
        assert (result.scores_RxM[row, len(titles) :] == -np.inf).all()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_text_is_that_of_a_plain_beam_search(decoder, penalty, temperature):
    lengths_B = np.array(list(map(len, texts())), np.int32)
    tokens_BxS = np.stack([np.pad(text, (0, 6 - len(text))) for text in texts()]).astype(np.int32)

    @nnx.jit
    def run(decoder, tokens, lengths):
        _, prompts = prefill_prompts(decoder, tokens, lengths)
        how = {"temperature": temperature, "length_penalty": penalty}
        return generate(decoder, prompts, jnp.int32(oracle.END), beams=BEAMS, most=MOST, **how)

    text_BxTg, length_B = jax.tree.map(np.asarray, run(decoder, tokens_BxS, lengths_B))
    expected = [free_text(decoder, text, temperature, penalty) for text in texts()]
    ours = [row[:length].tolist() for row, length in zip(text_BxTg, length_B, strict=True)]
    assert ours == expected
    assert penalty or len({*map(len, expected)}) > 1  # a mean prefers the longest


def test_titles_are_ranked_by_their_distance_to_the_text(decoder):
    check(found(decoder), lambda row: grounded(decoder, free_text(decoder, texts()[row])))


@pytest.mark.parametrize("filtered", [False, True])
def test_guidance_and_filters(decoder, filtered):
    rng = np.random.default_rng(5)
    cf_RxI = rng.normal(size=(ROWS, ITEMS)).astype(np.float32)
    allowed_RxI = rng.random((ROWS, ITEMS)) < (0.4 if filtered else 1.1)
    allowed_RxI[:, 3] = True
    weights = ScoreWeights(guidance=3.0)
    allowed = {"allowed": lambda rows_B: allowed_RxI[rows_B]} if filtered else {}
    result = found(decoder, weights=weights, cf=lambda b: cf_RxI[b], cf_items=DENSE, **allowed)
    check(
        result,
        lambda row: grounded(
            decoder, free_text(decoder, texts()[row]), allowed_RxI[row], cf_RxI[row], 3.0
        ),
    )


def test_scores_of_candidates_are_those_among_all(decoder):
    """Without `renormalise`, as Recommender.score asks for them."""
    allowed_I = np.isin(np.arange(ITEMS), [0, 4, 6])
    config = SearchConfig(3, find="grounding", grounding_beams=BEAMS, grounding_tokens=MOST,
                          renormalise=False)  # fmt: skip
    result = found(decoder, config, allowed=lambda rows_B: np.tile(allowed_I, (len(rows_B), 1)))
    for row in range(ROWS):
        among_all = grounded(decoder, free_text(decoder, texts()[row]))
        expected = sorted((among_all[tuple(oracle.WORDS[i])] for i in (0, 4, 6)), reverse=True)
        np.testing.assert_allclose(result.scores_RxM[row], expected, atol=2e-5)


def test_the_catalogue_is_read_once_for_each_model(decoder, monkeypatch):
    search = BatchedSearch(TRIE, CONFIG, mesh=make_mesh(1), batch_size=4, buckets=1)
    rows = SearchRows(Ragged.from_lengths(np.array([1, 2]), np.array([2])))
    first = search.recommend(decoder, rows, progress=None)
    monkeypatch.setattr("tca4rec_jax.decoding.engine.Embedder", None)
    again = search.of_sizes(search.sizes(np.array([2]))).recommend(decoder, rows, progress=None)
    np.testing.assert_array_equal(first.leaves_RxM, again.leaves_RxM)
    three = search.of_config(dataclasses.replace(CONFIG, beams=3))
    fewer = three.recommend(decoder, rows, progress=None)
    np.testing.assert_array_equal(first.leaves_RxM[:, :3], fewer.leaves_RxM)


def test_titles_without_an_end_token_are_refused(decoder):
    search = BatchedSearch(ItemTrie.build([[1, 2], [1, 3]]), CONFIG, mesh=make_mesh(1))
    rows = SearchRows(Ragged.from_lengths(np.array([1, 2]), np.array([2])))
    with pytest.raises(UserError, match=r"decoding.find is 'grounding'.* set prompt.end"):
        search.recommend(decoder, rows, progress=None)
