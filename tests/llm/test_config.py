"""Sizes and FLOPs of the architecture."""

import dataclasses

import pytest

from tca4rec_jax.llm.config import DecoderConfig, RopeScaling

SMOLLM2 = DecoderConfig(49152, 576, 1536, 30, 9, 3, 64, 1e5, 1e-5, True, 8192)


def test_flops_of_smollm2():
    """106.2 million layer weights and 28.3 million of the vocabulary."""
    layers = 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)
    vocabulary = 49152 * 576
    assert SMOLLM2.flops_per_token() == 2 * (layers + vocabulary)
    assert SMOLLM2.flops_per_token("lora") == 4 * (layers + vocabulary)
    assert SMOLLM2.flops_per_token("full", vocabulary_share=0.5) == 6 * (layers + vocabulary / 2)
    # Scores and the weighted sum: two products of 9 heads x 64 per key and layer, 2 FLOPs each.
    attention = SMOLLM2.flops_per_token(context=100) - SMOLLM2.flops_per_token()
    assert attention == 30 * 2 * 2 * 9 * 64 * 100
    trained = SMOLLM2.flops_per_token("lora", context=100) - SMOLLM2.flops_per_token("lora")
    assert trained == 3 * attention
    half = SMOLLM2.flops_per_token("lora", first_layer=15, vocabulary_share=0.0, context=100)
    whole = SMOLLM2.flops_per_token("lora", vocabulary_share=0.0, context=100)
    forward = SMOLLM2.flops_per_token(vocabulary_share=0.0, context=100)
    assert half == (whole + forward) / 2
    with pytest.raises(ValueError, match="'backward'"):
        SMOLLM2.flops_per_token("backward")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 2}, "num_heads"),
        ({"head_dim": 63}, "head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"biases": ("z_proj",)}, "z_proj"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOLLM2, **change)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("yarn", 2.0), "'yarn'"),
        (("linear", 0.0), "factor"),
        (("llama3", 8.0, 4.0, 1.0), "high_freq_factor"),
    ],
)
def test_impossible_rope_scaling_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*fields)


def test_of_the_first_layers_only_those_that_are_there_see_everything():
    config = DecoderConfig(8, 4, 4, 6, 2, 1, 2, sliding_window=3, full_layers=(0, 1, 4))
    cut = {count: config.first_layers(count) for count in (2, 4, 6)}
    assert (cut[2].num_layers, cut[2].sliding_window, cut[2].full_layers) == (2, None, ())
    assert (cut[4].num_layers, cut[4].sliding_window, cut[4].full_layers) == (4, 3, (0, 1))
    assert cut[6] == config
