"""Projected vectors in the place of embeddings, against projections and embeddings by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.llm.projector import (
    Projector,
    ProjectorConfig,
    ProjectorParam,
    SoftTokens,
    init_projector,
)

CONFIG = DecoderConfig(61, 32, 48, 2, 6, 2, 8, max_positions=64, embedding_scale=3.0)
INPUTS = 5
PUBLISHED = ProjectorConfig(width=7, activation="relu")
SETTINGS = [ProjectorConfig(), PUBLISHED, ProjectorConfig(layers=1), ProjectorConfig(9, 3)]


def make_projector(config):
    params = init_projector(config, INPUTS, CONFIG.hidden_size, jax.random.key(4))
    return Projector(config, params, INPUTS, CONFIG.hidden_size)


def by_hand(projector, vectors):
    """In float64, from the parameters alone."""
    x = np.asarray(vectors, np.float64)
    params = {name: np.asarray(value[...], np.float64) for name, value in projector.layers.items()}
    for index in range(projector.config.layers):
        if index and projector.config.activation == "gelu":
            x = x * (1 + erf(x / np.sqrt(2))) / 2
        elif index:
            x = np.maximum(x, 0)
        x = x @ params[f"weight_{index}"] + params[f"bias_{index}"]
    return x


def make_decoder(projector, first_layer=0, params=None, config=CONFIG):
    lora = LoRAConfig(rank=3, first_layer=first_layer)
    adapters = init_adapters(config, lora, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    params = init_params(config, jax.random.key(0)) if params is None else params
    return Decoder(config, params, lora=lora, adapters=adapters, projector=projector)


def soft_tokens():
    """Of three rows: two, one and none; padding beyond the end."""
    vectors = np.random.default_rng(0).normal(size=(3, 2, INPUTS)).astype(np.float32)
    return SoftTokens(np.array([[1, 5], [4, 8], [8, 9]], np.int32), vectors)


def with_vectors_in_the_vocabulary(decoder, tokens, soft):
    """The same decoder without a projector, but with a row of the embedding for each soft token."""
    params, _ = decoder.arrays()
    projected = by_hand(decoder.projector, soft.vector_BxLxC) / CONFIG.embedding_scale
    table = np.concatenate([params["embedding"], projected.reshape(-1, CONFIG.hidden_size)])
    config = DecoderConfig(**{**vars(CONFIG), "vocab_size": len(table)})
    tokens = tokens.copy()
    for index, (row, at) in enumerate(np.ndindex(soft.position_BxL.shape)):
        if soft.position_BxL[row, at] < tokens.shape[1]:
            tokens[row, soft.position_BxL[row, at]] = CONFIG.vocab_size + index
    head = np.pad(params["lm_head"], ((0, 0), (0, len(table) - CONFIG.vocab_size)))
    params |= {"embedding": jnp.asarray(table, jnp.float32), "lm_head": jnp.asarray(head)}
    return make_decoder(None, decoder.frozen_layers, params, config), tokens


@pytest.mark.parametrize("config", SETTINGS)
def test_projection(config):
    projector, vectors = make_projector(config), soft_tokens().vector_BxLxC
    np.testing.assert_allclose(projector(vectors), by_hand(projector, vectors), atol=1e-5)


@pytest.mark.parametrize("first_layer", [0, 1])
def test_soft_tokens_are_read_as_embeddings(first_layer):
    decoder, soft = make_decoder(make_projector(PUBLISHED), first_layer), soft_tokens()
    tokens = np.random.default_rng(1).integers(0, 61, (3, 8), dtype=np.int32)
    lengths = np.array([7, 5, 8])
    expected, its_tokens = with_vectors_in_the_vocabulary(decoder, tokens, soft)
    states = expected.hidden(its_tokens, lengths)
    np.testing.assert_allclose(decoder.hidden(tokens, lengths, soft=soft), states, atol=1e-5)
    last = lengths[:, None] - 1
    got = decoder.prefill(tokens, last, soft=soft)
    of_vocabulary = expected.prefill(its_tokens, last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, of_vocabulary)
    plain = decoder.hidden(tokens, lengths)
    np.testing.assert_array_equal(plain[2], decoder.hidden(tokens, lengths, soft=soft)[2])
    assert np.abs(plain[0] - states[0]).max() > 0.1


@pytest.mark.parametrize("first_layer", [0, 1])
def test_the_gradient_reaches_the_projector_alone(first_layer):
    decoder, soft = make_decoder(make_projector(PUBLISHED), first_layer), soft_tokens()
    tokens = np.random.default_rng(1).integers(0, 61, (3, 8), dtype=np.int32)
    graph, projector, base = nnx.split(decoder, ProjectorParam, ...)
    towards = jax.random.normal(jax.random.key(9), (3, 8, CONFIG.hidden_size))

    def total(projector):
        hidden = nnx.merge(graph, projector, base).hidden(tokens, np.array([7, 5, 8]), soft=soft)
        return jnp.sum(hidden * towards)

    gradient = jax.jit(jax.grad(total))(projector)
    assert {path[0] for path, _ in nnx.to_flat_state(gradient)} == {"projector"}
    for name in ("weight_0", "weight_1"):
        values = []
        for step in (1e-2, -1e-2):
            moved = jax.tree.map(lambda leaf: leaf, projector)
            weight = moved["projector"]["layers"][name]
            weight[...] = weight[...].at[0, 3].add(step)
            values.append(total(moved))
        slope = gradient["projector"]["layers"][name][...][0, 3]
        np.testing.assert_allclose((values[0] - values[1]) / 2e-2, slope, rtol=0.02)


def test_soft_tokens_that_nothing_can_read():
    tokens, lengths, soft = np.zeros((3, 8), np.int32), np.full(3, 8), soft_tokens()
    with pytest.raises(ValueError, match="need a decoder with a projector"):
        make_decoder(None).hidden(tokens, lengths, soft=soft)
    decoder = make_decoder(make_projector(PUBLISHED), first_layer=1)
    with pytest.raises(ValueError, match="frozen prefix has run without"):
        decoder.hidden(tokens, lengths, soft=soft, frozen_BxSxD=decoder.frozen_prefix(tokens))
    with pytest.raises(ValueError, match="frozen prefix has run without"):
        decoder.prefill(
            tokens, lengths[:, None], soft=soft, prefix=decoder.prefill_prefix(tokens, 1)
        )


def test_parameters_of_another_shape():
    params = init_projector(PUBLISHED, INPUTS, 16, jax.random.key(0))
    with pytest.raises(UserError, match=r"weight_1 has shape \(7, 16\), expected \(7, 32\)"):
        Projector(PUBLISHED, params, INPUTS, 32)
    with pytest.raises(UserError, match="missing weight_1"):
        Projector(PUBLISHED, {k: v for k, v in params.items() if k != "weight_1"}, INPUTS, 16)
