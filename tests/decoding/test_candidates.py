"""Scores of given candidates against exhaustive scoring."""

import numpy as np
import oracle
import pytest

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.engine import SearchRows
from tca4rec_jax.decoding.recommender import score_candidates
from tca4rec_jax.distributed.sharding import make_mesh

SEQUENCES = oracle.with_end(oracle.WORDS)
TRIE = ItemTrie.build(SEQUENCES)
ROWS = 6
TOKENS, LENGTHS = oracle.prompts(ROWS, 7)
PROMPTS = Ragged.from_lengths(TOKENS[np.arange(7) < LENGTHS[:, None]], LENGTHS)
CF_LOGITS = np.random.default_rng(1).normal(0, 3, (ROWS, len(SEQUENCES))).astype(np.float32)


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_scores_are_those_of_the_whole_catalogue(mask):
    decoder = oracle.tiny_decoder()
    rng = np.random.default_rng(0)
    lists = [rng.permutation(len(SEQUENCES))[: rng.integers(1, 7)] for _ in range(ROWS)]
    lists[0] = np.array([1, 3, 13, 0])  # three items of one title, and a prefix of it
    candidates = Ragged.from_lengths(np.concatenate(lists), [len(one) for one in lists])
    weights = ScoreWeights(0.7, 1.5, 1.3, 0.5)
    found = score_candidates(
        TRIE, mask, decoder, SearchRows(PROMPTS, CF_LOGITS.__getitem__), candidates, weights,
        mesh=make_mesh(2), batch_size=6,
    )  # fmt: skip
    for row, items in enumerate(lists):
        expected = oracle.exhaustive_scores(
            decoder, PROMPTS[row].tolist(), SEQUENCES, mask, weights, CF_LOGITS[row]
        )
        expected = [expected[tuple(SEQUENCES[item])] for item in items]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "lengths", "message"),
    [
        ([1, 2], [1] * 2, "2 rows of candidates for 6 prompts"),
        ([1] * 5, [1, 0, 1, 1, 1, 1], "row 1 has no candidates"),
        ([1, 1, 14, 1, 1, 1], [1] * 6, r"row 2: candidate 14 is not an item \(0\.\.13\)"),
    ],
)
def test_unusable_candidates_are_errors(values, lengths, message):
    candidates = Ragged.from_lengths(np.array(values), lengths)
    with pytest.raises(ValueError, match=message):
        score_candidates(
            TRIE, "before_softmax", None, SearchRows(PROMPTS), candidates, ScoreWeights(),
            mesh=make_mesh(1),
        )  # fmt: skip
