"""The published models: parameters as their makers count them, fields as transformers does."""

import math

import pytest

from tca4rec_jax.llm.architectures import ARCHITECTURES, architecture
from tca4rec_jax.llm.families import config_fields, decoder_config

# From the models' cards (safetensors' totals; tied embeddings counted once).
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "gemma-3-270m": 268_098_176,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parameters_add_up_to_the_published_number(name):
    shapes = architecture(name).parameter_shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_can_express_it(name):
    for config in (architecture(name), architecture(name).first_layers(2)):
        assert decoder_config(config_fields(config)) == config


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'gpt-2'.*llama-3.2-3b"):
        architecture("gpt-2")
