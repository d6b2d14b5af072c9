"""What the compiled training program never holds, read from its HLO.

Real sizes where they matter (vocabulary, sequence, titles, items); a decoder of one narrow layer.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.recommenders import GENERATIVE
from tca4rec_jax.training.batches import BatchShape, abstract_batch

ROWS, POSITIONS, TITLES, ITEMS, WIDTH = 4, 240, 24, 3001, 64
SHAPE = BatchShape(rows=ROWS, tokens=256, positions=POSITIONS, titles=TITLES, decisions=56)
VOCABULARY = 49152


def compiled_shapes(softmax):
    """The dimensions of every array in the optimised program of a loss and its gradient."""
    config = DecoderConfig(VOCABULARY, 16, 32, 1, 2, 1, 8, max_positions=512)
    lora = LoRAConfig(rank=2, dropout=0.0)
    params = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32)
        for path, shape in config.parameter_shapes.items()
    }
    adapters = init_adapters(config, lora, jax.random.key(0))
    abstract = Decoder(config, params, lora=lora, adapters=adapters)
    graph, adapters, base = nnx.split(abstract, nnx.LoRAParam, ...)
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 400, rng.integers(1, 9)).tolist() for _ in range(ITEMS)]
    trie = DeviceTrie.of(ItemTrie.build([[*word, 0] for word in words]).compress())

    def loss(adapters, base, batch, table_IxD, trie, objective):
        decoder = nnx.merge(graph, adapters, base)
        return GENERATIVE.loss(decoder, batch, CFItems(table_IxD), trie, objective).total

    table = jax.ShapeDtypeStruct((ITEMS, WIDTH), jnp.float32)
    objective = Objective(0.3, 1.0, 1.0, "cross_entropy", softmax)
    batch = abstract_batch(SHAPE, WIDTH)
    program = jax.jit(jax.grad(loss)).lower(adapters, base, batch, table, trie, objective)
    found = re.findall(r"\b(?:f32|bf16|f16|f64)\[([\d,]+)\]", program.compile().as_text())
    return {tuple(map(int, dimensions.split(","))) for dimensions in found}


@pytest.mark.parametrize("softmax", ["vocabulary", "children"])
def test_nothing_has_the_size_of_all_positions_by_vocabulary_or_items(softmax):
    shapes = compiled_shapes(softmax)
    assert any(VOCABULARY in shape for shape in shapes)
    largest = max(math.prod(shape) for shape in shapes if VOCABULARY in shape)
    # Less even than the supervised positions alone would need: the head runs in chunks.
    assert largest < ROWS * POSITIONS * VOCABULARY / 2
    if softmax == "children":  # the head knows the trie's tokens only
        wide = {tuple(sorted(shape)) for shape in shapes if VOCABULARY in shape}
        assert wide == {(16, VOCABULARY)}  # the embedding table itself
    by_item = [shape for shape in shapes if ITEMS in shape]
    assert by_item
    for shape in by_item:
        assert math.prod(shape) // ITEMS <= ROWS * TITLES < ROWS * POSITIONS
