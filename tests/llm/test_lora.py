"""Adapters: what they compute, where they go, and their dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.lora import LoRAConfig, adapter_shapes, dropout, init_adapters, lora_deltas

CONFIG = DecoderConfig(11, 8, 12, 2, 2, 1, 4)


def test_deltas_are_scaled_products_with_their_gradients():
    lora = LoRAConfig(rank=3, alpha=6.0, dropout=0.5)
    generator = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    x, widths = normal(2, 5, 8), (4, 6)
    adapters = [{"a": normal(8, 3), "b": normal(3, width)} for width in widths]
    d_out = [normal(2, 5, width) for width in widths]

    def products(x, adapters):
        return [2.0 * x @ adapter["a"] @ adapter["b"] for adapter in adapters]

    found, backward = jax.vjp(lambda *of: lora_deltas(*of, lora), x, adapters)
    expected, oracle = jax.vjp(products, x, adapters)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)
    jax.tree.map(close, backward(d_out), oracle(d_out))


def test_targets_choose_projections():
    assert set(adapter_shapes(CONFIG, LoRAConfig())) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    shapes = adapter_shapes(CONFIG, LoRAConfig(rank=2, targets="down_proj"))
    assert shapes == {"down_proj": {"a": (2, 12, 2), "b": (2, 2, 8)}}
    with pytest.raises(ValueError, match=r"'query': expected to match a projection, one of q_proj"):
        adapter_shapes(CONFIG, LoRAConfig(targets="query"))
    with pytest.raises(ValueError, match="first_layer is 2: expected at most 1"):
        adapter_shapes(CONFIG, LoRAConfig(first_layer=2))


def test_initial_adapters():
    adapters = init_adapters(CONFIG, LoRAConfig(rank=4), jax.random.key(0))
    for adapter in adapters.values():
        assert np.all(np.asarray(adapter["b"]) == 0)
        assert 0.2 < np.abs(adapter["a"]).max() <= 8**-0.5
    assert not np.array_equal(adapters["q_proj"]["a"], adapters["v_proj"]["a"])


def test_dropout_keeps_the_mean_and_the_rate():
    dropped = np.asarray(
        dropout(jnp.ones((400, 500)), 0.05, jax.random.split(jax.random.key(0), 400))
    )
    assert abs((dropped == 0).mean() - 0.05) < 0.002
    assert abs(dropped.mean() - 1) < 0.002
    kept = dropped[dropped != 0]
    np.testing.assert_allclose(kept, 1 / 0.95, rtol=1e-4)


def test_no_dropout_without_a_key():
    x = jnp.ones((3, 4))
    assert dropout(x, 0.9, None) is x


@pytest.mark.parametrize("change", [{"rank": 0}, {"dropout": 1.0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        LoRAConfig(**change)
