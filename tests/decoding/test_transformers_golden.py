"""The rules of 'huggingface' against what transformers' constrained beam search found."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "decoding.npz"))
CONFIG = DecoderConfig(
    vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, max_positions=64, tie_embeddings=True,
)  # fmt: skip


def ragged(name):
    return Ragged.from_lengths(GOLDEN[f"{name}/values"].astype(np.int32), GOLDEN[f"{name}/lengths"])


@pytest.mark.parametrize("beams", [3, 8])
def test_items_and_scores_are_those_of_transformers(beams):
    prefix = "params/"
    params = {
        name.removeprefix(prefix): jnp.asarray(value)
        for name, value in GOLDEN.items()
        if name.startswith(prefix)
    }
    trie = ItemTrie.build(ragged("titles"))
    search = BatchedSearch(
        trie,
        SearchConfig(beams, "after_softmax", "huggingface"),
        mesh=make_mesh(2),
        batch_size=12,
        buckets=1,
    )
    found = search.recommend(
        Decoder(CONFIG, params),
        SearchRows(ragged("prompts")),
        ScoreWeights(length_penalty=1.0),
        progress=None,
    )
    titles_RxMxL, scores_RxM = (GOLDEN[f"found/{beams}/{part}"] for part in ("titles", "scores"))
    np.testing.assert_allclose(found.scores_RxM, scores_RxM, atol=1e-4)
    for row, leaves_M in enumerate(found.leaves_RxM):
        ours = [tuple(trie.tokens_QxL[leaf, : trie.lengths_Q[leaf]]) for leaf in leaves_M]
        theirs = [tuple(title[title >= 0]) for title in titles_RxMxL[row]]
        gaps = -np.diff(scores_RxM[row])
        assert (gaps > 1e-4).all(), "the golden has ties: the order would be arbitrary"
        assert ours == theirs
