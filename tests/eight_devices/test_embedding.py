"""Embeddings of texts on meshes of eight devices against one device."""

import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.embedder import Embedder, ItemTexts
from tca4rec_jax.distributed.sharding import make_mesh, tree_shardings
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params

CONFIG = DecoderConfig(61, 32, 64, 2, 8, 8, 4, max_positions=64)
LENGTH_I = np.arange(20, 0, -1)
TEXTS = ItemTexts(
    Ragged.from_lengths(np.arange(LENGTH_I.sum(), dtype=np.int32) % 61, LENGTH_I),
    np.minimum(LENGTH_I - 1, 1).astype(np.int32),
)


def embedded(sizes, pooling):
    mesh, decoder = make_mesh(*sizes), Decoder(CONFIG, init_params(CONFIG, jax.random.key(0)))
    graph, state = nnx.split(decoder)
    state = jax.device_put(state, tree_shardings(mesh, CONFIG, state))
    embedder = Embedder(nnx.merge(graph, state), mesh, pooling, batch_size=8)
    found = embedder.embed(TEXTS, np.array([8, 24]), np.arange(len(LENGTH_I)))
    return np.concatenate(list(found))


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_every_mesh_gives_what_one_device_gives(sizes, pooling):
    expected = embedded((1, 1, 1), pooling)
    assert expected.shape == (20, 32)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 0.1
    np.testing.assert_allclose(embedded(sizes, pooling), expected, atol=1e-5)
