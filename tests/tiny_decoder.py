"""A decoder of two layers with random weights."""

import dataclasses

import jax
import numpy as np

from tca4rec_jax.llm.config import DecoderConfig, DecoderOptions
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import init_adapters

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
    max_positions=512,
)
# A window shorter than the prompts, in all layers and in one.
WINDOW = dataclasses.replace(CONFIG, sliding_window=3, qk_norm=True)
MIXED = dataclasses.replace(CONFIG, sliding_window=4, full_layers=(1,))


def make_decoder(lora=None, options=DecoderOptions(), config=CONFIG):  # noqa: B008 - frozen
    adapters = None
    if lora is not None:
        adapters = init_adapters(config, lora, jax.random.key(1))
        # A zero B would hide every mistake in the adapters.
        adapters = jax.tree.map(
            lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapters
        )
    params = init_params(config, jax.random.key(0))
    return Decoder(config, params, lora=lora, adapters=adapters, options=options)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape, dtype=np.int32)
