"""The decoder in training: gradients of adapters, what is not computed, dropout, FLOPs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_decoder import CONFIG, make_decoder, random_tokens

from tca4rec_jax.llm.blocks import Layer
from tca4rec_jax.llm.config import DecoderConfig, DecoderOptions
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig


@functools.cache
def gradient_program(options, first_layer=0):
    """(adapters, base, function) of the loss and its gradient in the adapters."""
    lora = LoRAConfig(rank=4, dropout=0.25, first_layer=first_layer)
    decoder = make_decoder(lora, options)
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)
    tokens, lengths = random_tokens((2, 11)), np.array([11, 6])

    @jax.jit
    def gradient(adapters, base, dropout_key):
        def loss(adapters):
            decoder = nnx.merge(graph, adapters, base)
            keys = None if dropout_key is None else jax.random.split(dropout_key, len(tokens))
            hidden = decoder.hidden(tokens, lengths, dropout_key_B=keys)
            return jax.nn.logsumexp(decoder.head()(hidden), axis=-1).mean()

        return jax.value_and_grad(loss)(adapters)

    return adapters, base, gradient


def adapter_gradient(options, dropout_key):
    adapters, base, gradient = gradient_program(options)
    value, gradients = gradient(adapters, base, dropout_key)
    return value, nnx.to_pure_dict(gradients)["adapters"]


@pytest.mark.parametrize("remat", ["full", "none"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    key = jax.random.key(5)
    value, gradients = adapter_gradient(DecoderOptions(remat=remat), key)
    expected_value, expected = adapter_gradient(DecoderOptions(), key)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected)


def weights_shaped_products(jaxpr, shapes):
    """Matrix products, at any depth, whose result has one of the shapes (or its transpose)."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shape = equation.outvars[0].aval.shape
            count += shape in shapes or shape[::-1] in shapes
        for inner in jax.core.jaxprs_in_params(equation.params):
            count += weights_shaped_products(inner, shapes)
    return count


def test_no_gradient_of_a_base_weight_is_computed():
    """The guard of the cost model: 4 FLOPs per weight and token, not 6."""
    adapters, base, gradient = gradient_program(DecoderOptions())
    jaxpr = jax.make_jaxpr(gradient)(adapters, base, None).jaxpr
    shapes = {*CONFIG.projection_shapes.values(), (CONFIG.vocab_size, CONFIG.hidden_size)}
    assert weights_shaped_products(jaxpr, {(32, 4)}) > 0, "the adapters' gradients are found"
    assert weights_shaped_products(jaxpr, shapes) == 0


def test_layers_below_the_first_adapted_one_have_no_gradient():
    key = jax.random.key(5)
    adapters, base, gradient = gradient_program(DecoderOptions())
    # As initialised: adapters of the lower layer that change nothing.
    untrained = jax.tree.map_with_path(
        lambda path, x: x.at[0].set(0) if path[-2].key == "b" else x, adapters
    )
    expected_value, expected = gradient(untrained, base, key)
    _, _, gradient = gradient_program(DecoderOptions(), first_layer=1)
    value, found = gradient(adapters, base, key)  # whatever the lower layer's adapters are
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)

    def check(found, expected):
        np.testing.assert_allclose(found[1:], expected[1:], atol=1e-6)
        assert np.any(found[1:])
        assert not np.any(found[0])

    jax.tree.map(check, found, expected)


def product_flops(jaxpr):
    """FLOPs of all matrix products, at any depth; a scan's body counts as often as it runs."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            summed = math.prod(shape[axis] for axis in contracted)
            flops += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1)
        for inner in jax.core.jaxprs_in_params(equation.params):
            flops += times * product_flops(inner)
    return flops


def test_layers_below_the_first_adapted_one_cost_a_forward_pass():
    def flops(first_layer):
        adapters, base, gradient = gradient_program(DecoderOptions(), first_layer)
        return product_flops(jax.make_jaxpr(gradient)(adapters, base, None).jaxpr)

    saved = 1 - flops(1) / flops(0)
    assert 0.2 < saved < 0.5, "of a layer of two: its backward pass, and its adapters"


def test_the_weights_of_some_layers_are_not_copied():
    """A slice of the stacks would be a second copy of the model, made in every step."""
    adapters, base, gradient = gradient_program(DecoderOptions(), first_layer=1)
    program = jax.make_jaxpr(gradient)(adapters, base, None).jaxpr

    def sliced_shapes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "slice":
                yield equation.outvars[0].aval.shape[1:]
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from sliced_shapes(inner)

    found = set(sliced_shapes(program))
    assert (32, 4) in found, "those of the adapters are found"
    assert not found & set(CONFIG.projection_shapes.values())


@pytest.mark.parametrize("kind", ["forward", "lora", "full"])
def test_flops_per_token_counts_the_products_of_a_step(kind):
    tokens, lora = random_tokens((2, 12)), LoRAConfig(rank=4)
    decoder = make_decoder(lora if kind == "lora" else None, DecoderOptions(remat="none"))
    trained = nnx.LoRAParam if kind == "lora" else nnx.Param
    graph, params, base = nnx.split(decoder, trained, ...)

    def loss(params, base):
        decoder = nnx.merge(graph, params, base)
        return decoder.head()(decoder.hidden(tokens, np.array([12, 12]))).sum()

    step = loss if kind == "forward" else jax.grad(loss)
    # So few queries all attend to every key, masked or not.
    counted = product_flops(jax.make_jaxpr(step)(params, base).jaxpr) / tokens.size
    expected = CONFIG.flops_per_token(kind, context=12)
    if kind != "forward":  # attention scores are made again in the backward pass
        expected += CONFIG.flops_per_token("forward", context=12) / 2
        expected -= CONFIG.flops_per_token("forward") / 2
    if kind == "lora":
        sizes = [sum(CONFIG.projection_shapes[f"{name}_proj"]) for name in "qkvo"]
        expected += CONFIG.num_layers * 6 * lora.rank * sum(sizes)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_dropout_is_a_function_of_its_key():
    without, _ = adapter_gradient(DecoderOptions(), None)
    first, _ = adapter_gradient(DecoderOptions(), jax.random.key(3))
    again, _ = adapter_gradient(DecoderOptions(), jax.random.key(3))
    other, _ = adapter_gradient(DecoderOptions(), jax.random.key(4))
    assert first == again
    assert len({float(without), float(first), float(other)}) == 3


def test_dropout_leaves_out_a_share_of_the_embeddings_and_of_what_blocks_add():
    config = DecoderConfig(61, 512, 48, 2, 6, 2, 8)
    params = init_params(config, jax.random.key(0))
    options = DecoderOptions(remat="none", dropout=0.25)
    decoder = Decoder(config, params, options=options)
    tokens, lengths = np.arange(40).reshape(2, 20), np.array([20, 20])
    keys = jax.random.split(jax.random.key(1))
    dropped = decoder.hidden(tokens, lengths, dropout_key_B=keys)
    plain = Decoder(config, params).hidden(tokens, lengths)
    np.testing.assert_array_equal(decoder.hidden(tokens, lengths), plain)
    assert not np.allclose(dropped, plain, atol=0.1)
    other_row = decoder.hidden(tokens[::-1], lengths, dropout_key_B=keys[::-1])
    np.testing.assert_array_equal(dropped, other_row[::-1])  # a row's mask is its own key's

    # With nothing added by the layers the embeddings are left, some of them zero.
    outputs = {name: params[name] for name in ("layers/o_proj", "layers/down_proj")}
    idle = params | jax.tree.map(jnp.zeros_like, outputs)
    states = Decoder(config, idle, options=options).hidden(tokens, lengths, dropout_key_B=keys)
    assert np.mean(np.asarray(states) == 0) == pytest.approx(0.25, abs=0.01)

    layer = Layer(config, {}, None, {}, keys, 0.25)
    x, y = jnp.ones((2, 20, 512)), jnp.full((2, 20, 512), 3.0)
    sites = [np.asarray(layer.add(x, y, site=site)) for site in (4, 5)]
    for added in sites:
        assert set(np.unique(added)) == {1.0, 5.0}
        assert np.mean(added == 1) == pytest.approx(0.25, abs=0.01)
    assert (sites[0] != sites[1]).any()


def test_products_beside_adapters_keep_the_axes_of_tokens():
    """Merged, sharded ones cost a TPU a tenth more cycles (Llama-3.1-8B on fsdp x tensor)."""
    layer = Layer(CONFIG, {"q_proj": jnp.ones((4, 5))}, LoRAConfig(), {}, None)
    product = jax.jit(lambda x: layer.project(x, "q_proj", site=0))
    lowered = product.lower(jnp.ones((2, 3, 4))).as_text()
    assert "dot_general" in lowered
    assert "reshape" not in lowered
