"""Quantised projections: what is stored, the decoder against one of their floats, exports."""

import dataclasses
import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from tca4rec_jax.llm.checkpoints.export import (
    export_decoder,
    write_hugging_face,
)
from tca4rec_jax.llm.checkpoints.gguf import GGUFFile
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import GROUP, SCALES, DecoderConfig, DecoderOptions, logical_axes
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters, merge_adapters
from tca4rec_jax.llm.quantisation import LEVELS, dequantise, dequantise_params, quantise

CONFIG = DecoderConfig(
    61,
    64,
    128,
    2,
    4,
    2,
    32,
    max_positions=64,
    family="qwen2",
    biases=("q_proj", "k_proj", "v_proj"),
)
LORA = LoRAConfig(rank=4, dropout=0.0)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 11), dtype=np.int32)
LENGTHS = np.array([11, 6])


def written(folder, tokenizer):
    params = init_params(CONFIG, jax.random.key(0))
    write_hugging_face(folder, CONFIG, params, tokenizer, dtype="float32")
    return folder


@pytest.fixture(scope="module", params=SCALES)
def case(request, tmp_path_factory, tokenizer):
    """(quantised decoder as it is loaded, the plain one of its dequantised weights)."""
    folder = written(tmp_path_factory.mktemp("quantised") / "model", tokenizer)
    config, params = load_weights(folder, quantised=request.param)
    adapters = jax.tree.map(lambda x: x + 0.02, init_adapters(CONFIG, LORA, jax.random.key(1)))
    plain = Decoder(*dequantise_params(config, params, jnp.float32), lora=LORA, adapters=adapters)
    return Decoder(config, params, lora=LORA, adapters=adapters), plain


def textbook(kind, weight_IxO):
    """Each group's nearest representable value, by trying all of them."""
    group = {"int8": weight_IxO.shape[0], "nf4": GROUP}[kind]
    levels = {"int8": np.arange(-127, 128) / 127, "nf4": np.array(LEVELS)}[kind]
    groups = weight_IxO.reshape(-1, group, weight_IxO.shape[1])
    values = np.abs(groups).max(axis=1)[:, None, :, None] * levels
    nearest = np.abs(values - groups[..., None]).argmin(axis=-1)
    return np.take_along_axis(values, nearest[..., None], axis=-1)[..., 0].reshape(weight_IxO.shape)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("nf4", 4.5)])
def test_every_weight_is_the_nearest_that_can_be_said(kind, bits):
    weight = np.random.default_rng(1).normal(size=(1024, 6)).astype(np.float32)
    weight[:64, 2] = 0
    codes, scale = quantise(kind, weight)
    again = dequantise(kind, codes, scale, jnp.float32)
    np.testing.assert_allclose(again, textbook(kind, weight), rtol=1e-6, atol=1e-7)
    half = dequantise(kind, codes, scale, jnp.bfloat16)
    np.testing.assert_array_equal(half, again.astype(jnp.bfloat16))
    assert (codes.nbytes + scale.nbytes) * 8 / weight.size == pytest.approx(bits, rel=0.005)


@jax.jit
def logits_of(decoder):
    return decoder.head()(decoder.hidden(TOKENS, LENGTHS))


def test_the_decoder_equals_the_plain_one_of_dequantised_weights(case):
    """Whole sequences, and a cache."""
    quantised, plain = case
    assert quantised.layers["q_proj"].dtype in (jnp.int8, jnp.uint8)
    np.testing.assert_allclose(logits_of(quantised), logits_of(plain), atol=1e-5)
    results = []
    for decoder in case:
        _, prompt = jax.jit(Decoder.prefill)(decoder, TOKENS, LENGTHS[:, None] - 1)
        cache = decoder.init_beam_cache(2, 1, 2)
        edge, count = TOKENS[:, None, :2], np.full((2, 1), 2)
        extend = jax.jit(functools.partial(Decoder.extend, per_user=2))
        args = decoder, edge, count, prompt, LENGTHS, cache, jnp.arange(4)
        results.append(extend(*args)[0])
    np.testing.assert_allclose(*results, atol=1e-5)


def adapter_gradient(decoder, remat):
    """(jitted gradient of the mean loss in the adapters, its two arguments)."""
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)

    def loss(adapters, base):
        decoder = nnx.merge(graph, adapters, base)
        decoder.options = DecoderOptions(remat=remat)
        logits = decoder.head()(decoder.hidden(TOKENS, LENGTHS))
        return jax.nn.logsumexp(logits, axis=-1).mean()

    return jax.jit(jax.grad(loss)), adapters, base


@pytest.mark.parametrize("remat", ["products", "none"])
def test_gradients_of_adapters(case, remat):
    programs = [adapter_gradient(decoder, remat) for decoder in case]
    found, expected = (gradient(*inputs) for gradient, *inputs in programs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(found))


def test_the_backward_pass_keeps_no_floats_of_a_weight(case):
    """Not even where every activation is kept: no stack of floats as large as gate_proj's."""
    gradient, *inputs = adapter_gradient(case[0], "none")
    program = str(jax.make_jaxpr(gradient)(*inputs))
    assert "f32[64,128]" in program
    assert "f32[2,64,128]" not in program


def test_scales_are_sharded_like_their_weights(tmp_path, tokenizer, case):
    """Inputs and outputs split over two devices: the same arrays, each with its share."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    split = {"feed_forward": "model", "heads": "model"}

    def sharding(_, path):
        return NamedSharding(mesh, P(*(split.get(axis) for axis in logical_axes(path))))

    folder, kind = written(tmp_path / "model", tokenizer), case[0].config.quantised
    config, params = load_weights(folder, sharding=sharding, quantised=kind)
    _, expected = load_weights(folder, quantised=kind)
    assert set(params) == set(expected) == set(config.parameter_shapes)
    shards = {path: value.sharding.shard_shape(value.shape) for path, value in params.items()}
    for path, value in params.items():
        assert value.sharding == sharding(config, path), path
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
        assert value.shape == config.parameter_shapes[path]
    scale = SCALES[kind]
    assert shards[f"layers/gate_proj{scale}"][-1] == 64
    for value in load_weights(  # what two devices share is one piece of memory
        folder, sharding=lambda *_: NamedSharding(mesh, P()), quantised=kind
    )[1].values():
        assert len({part.data.unsafe_buffer_pointer() for part in value.addressable_shards}) == 1
    assert shards[f"layers/down_proj{scale}"] == {"int8": (2, 64), "nf4": (2, 1, 64)}[kind]
    logits = logits_of(Decoder(config, params))
    np.testing.assert_allclose(logits, logits_of(Decoder(config, expected)), atol=1e-5)


def test_exports_are_floats(case, tmp_path, tokenizer):
    quantised, plain = case
    for kind in ("base", "merged"):
        export_decoder(
            tmp_path / kind, quantised, tokenizer, kind=kind, dtype="float32", base_model=""
        )
    base, merged = (load_file(tmp_path / kind / "model.safetensors") for kind in ("base", "merged"))
    name, path = "model.layers.1.self_attn.q_proj.weight", "layers/q_proj"
    np.testing.assert_array_equal(base[name], plain.layers["q_proj"][1].T)
    params, adapters = plain.arrays()
    np.testing.assert_array_equal(merged[name], merge_adapters(params, adapters, LORA)[path][1].T)


def test_what_cannot_be_quantised_is_named(tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match="llm.quantise is 'int3': expected one of 'int8', 'nf4', ''"
    ):
        dataclasses.replace(CONFIG, quantised="int3")
    with pytest.raises(ValueError, match="groups of 64, but down_proj has 96: use 'int8'"):
        dataclasses.replace(CONFIG, intermediate_size=96, quantised="nf4")
    folder = written(tmp_path / "model", tokenizer)
    config, params = load_weights(folder, quantised="int8")
    with pytest.raises(ValueError, match="cannot say that quantised is 'int8'"):
        write_hugging_face(tmp_path / "again", config, params, tokenizer, dtype="float32")


def test_errors_on_a_real_layer(smollm2_path):
    """Of SmolLM2's first layer, relative to the weights' and to the outputs' size."""
    tensors = {tensor.name: tensor for tensor in GGUFFile(smollm2_path).tensors}
    for name in ("attn_q", "ffn_down"):
        tensor = tensors[f"blk.0.{name}.weight"]
        weight = jnp.asarray(gguf.dequantize(tensor.data, tensor.tensor_type).T)
        x = jax.random.normal(jax.random.key(0), (32, weight.shape[0]))
        for kind, bound in (("int8", 0.02), ("nf4", 0.12)):
            again = dequantise(kind, *quantise(kind, weight), jnp.float32)
            for error, size in ((again - weight, weight), (x @ (again - weight), x @ weight)):
                assert jnp.linalg.norm(error) < bound * jnp.linalg.norm(size), (name, kind)
