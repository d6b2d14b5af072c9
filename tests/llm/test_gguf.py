"""Loading GGUF files: every family as from its Hugging Face folder, dtypes, bad files."""

import dataclasses
import json
import struct
import time
from pathlib import Path

import gguf
import jax
import make_decoder_golden as goldens
import numpy as np
import pytest

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.attention import rotary_frequencies
from tca4rec_jax.llm.checkpoints.gguf import GGUFFile
from tca4rec_jax.llm.checkpoints.loading import load_weights, read_architecture
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters

GOLDENS = Path(__file__).parent.parent / "goldens"
# Ours -> llama.cpp's.
LAYER_NAMES = {
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm",
}  # fmt: skip
ARCHITECTURES = {"gemma3_text": "gemma3"}  # where it is not the family's name
TOP_NAMES = {"embedding": "token_embd", "final_norm": "output_norm", "lm_head": "output"}


def load_golden(name, folder):
    goldens.write_files(folder, golden := goldens.read_model(name))
    return golden, *load_weights(folder)


def gguf_tensors(config, params):
    """The tensors that llama.cpp's converter writes for a decoder."""
    tensors = {}
    for path, value in params.items():
        value = np.asarray(value) + np.float32(config.norm_offset * path.endswith("_norm"))
        if path in TOP_NAMES:
            tensors[f"{TOP_NAMES[path]}.weight"] = value.T if path == "lm_head" else value
            continue
        name = path.removeprefix("layers/")
        kind = "bias" if name.endswith("_bias") else "weight"
        module = LAYER_NAMES[name.removesuffix("_bias")]
        for layer, part in enumerate(value):
            part = part.T
            if config.family == "llama" and module in ("attn_q", "attn_k"):
                halves = part.reshape(-1, 2, config.head_dim // 2, *part.shape[1:])
                part = halves.swapaxes(1, 2).reshape(part.shape)
            tensors[f"blk.{layer}.{module}.{kind}"] = part
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain, scaled = (
            rotary_frequencies(config.head_dim, config.rope_theta, scaling)
            for scaling in (None, config.rope_scaling)
        )
        tensors["rope_freqs.weight"] = plain / scaled
    return tensors


def write_gguf(path, config, tensors, *, kinds=None, architecture=None, more=None):
    """kinds: tensor name -> how its float32 values, or its bytes, are stored; more: metadata, by
    the writer's methods."""
    architecture = architecture or ARCHITECTURES.get(config.family, config.family)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    for name, value in (more or {}).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def as_stored(config):
    """Metadata holds float32."""
    return dataclasses.replace(config, rms_norm_eps=float(np.float32(config.rms_norm_eps)))


@pytest.mark.parametrize("name", ["llama2", "smollm2", "llama_biased", "qwen2", "qwen3"])
def test_the_same_as_from_hugging_face(tmp_path, name):
    _, config, params = load_golden(name, tmp_path)
    path = write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, params))
    loaded, again = load_weights(path)
    assert loaded == as_stored(config)
    assert_same_trees(again, params)


@pytest.mark.parametrize("pattern", [2, [True, False]])
def test_gemma3_is_the_same_as_from_hugging_face(tmp_path, pattern):
    """But for its queries, which a file of this size scales by the head, and the norms' last bit:
    their offset was added."""
    golden, config, params = load_golden("gemma3", tmp_path)
    config = dataclasses.replace(config, query_pre_attn_scalar=float(config.head_dim))
    more = {"sliding_window_pattern": pattern, "rope_freq_base_swa": config.local_rope_theta}
    tensors = gguf_tensors(config, params)
    loaded, again = load_weights(write_gguf(tmp_path / "model.gguf", config, tensors, more=more))
    assert loaded == as_stored(config)
    assert params.keys() == again.keys()
    for name, value in params.items():
        np.testing.assert_allclose(again[name], value, atol=2e-7 * name.endswith("_norm"))
    decoder = Decoder(dataclasses.replace(loaded, query_pre_attn_scalar=20.0), again)
    logits = decoder.head()(decoder.hidden(golden["tokens"], np.array([13, 13])))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=1e-5)


def test_gemma3_as_llama_cpp_takes_it_where_the_file_is_silent(tmp_path):
    _, config, _ = load_golden("gemma3", tmp_path)
    fields = {"rope_scaling": None, "sliding_window": 512, "local_rope_theta": 10000.0}
    # By layers: those that see everything, and 8 a head or 16 / 4 heads.
    expected = {12: ((5, 11), 8.0), 62: (tuple(range(5, 62, 6)), 4.0)}
    for layers, (full_layers, scalar) in expected.items():
        fields |= {"num_layers": layers, "full_layers": full_layers}
        large = dataclasses.replace(config, **fields, query_pre_attn_scalar=scalar)
        loaded = read_architecture(write_gguf(tmp_path / "a.gguf", large, {}))
        assert loaded == as_stored(large)
    capped = write_gguf(tmp_path / "b.gguf", large, {}, more={"final_logit_softcapping": 30.0})
    with pytest.raises(UserError, match=r"final_logit_softcapping is not supported"):
        read_architecture(capped)


def test_rotary_scaling_of_llama3(tmp_path):
    _, config, params = load_golden("llama3", tmp_path)
    config = dataclasses.replace(
        config, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 32.0)
    )
    tensors = gguf_tensors(config, params)
    loaded, again = load_weights(write_gguf(tmp_path / "model.gguf", config, tensors))
    assert loaded == as_stored(config)
    assert_same_trees(again, params)
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"] * np.float32(1.5)
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not the rotary scaling"):
        load_weights(write_gguf(tmp_path / "other.gguf", config, tensors))


def test_fresh_adapters_change_nothing(tmp_path):
    golden, config, params = load_golden("smollm2", tmp_path)
    path = write_gguf(tmp_path / "model.gguf", config, gguf_tensors(config, params))
    lora = LoRAConfig(rank=2)
    adapters = init_adapters(config, lora, jax.random.key(3))
    decoder = Decoder(*load_weights(path), lora=lora, adapters=adapters)
    assert set(decoder.adapters) == {"q_proj", "k_proj", "v_proj", "o_proj"}

    @jax.jit
    def logits(tokens):
        return decoder.head()(
            decoder.hidden(
                tokens, np.array([13, 13]), dropout_key_B=jax.random.split(jax.random.key(0))
            )
        )

    np.testing.assert_allclose(logits(golden["tokens"]), golden["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_quantised_tensors(tmp_path, kind):
    """The same as a float32 file of what gguf makes of each whole tensor."""
    kind = gguf.GGMLQuantizationType[kind]
    config = DecoderConfig(8, 256, 256, 1, 4, 2, 64)
    generator = np.random.default_rng(0)
    plain = gguf_tensors(
        config,
        {
            path: generator.normal(size=shape).astype(np.float32)
            for path, shape in config.parameter_shapes.items()
        },
    )
    matrices = [name for name, value in plain.items() if value.ndim == 2]
    stored = dict(plain)
    for name in matrices:
        try:
            stored[name] = gguf.quantize(plain[name], kind)
        except NotImplementedError:  # the K types can only be read
            shape = gguf.quant_shape_to_byte_shape(plain[name].shape, kind)
            stored[name] = generator.integers(0, 120, shape, dtype=np.uint8)
        plain[name] = gguf.dequantize(stored[name], kind).reshape(plain[name].shape)
    kinds = dict.fromkeys(matrices, kind)
    _, params = load_weights(write_gguf(tmp_path / "stored.gguf", config, stored, kinds=kinds))
    _, expected = load_weights(write_gguf(tmp_path / "plain.gguf", config, plain))
    assert np.asarray(expected["layers/q_proj"]).std() > 0
    assert_same_trees(params, expected)


def test_arrays_of_the_metadata_are_those_that_gguf_reads(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "arrays.gguf"), "llama")
    arrays = {"strings": ["a", "", "zwölf"], "floats": [0.5, -1.0], "booleans": [True, False]}
    arrays |= {"integers": list(range(5)), "nested": [[1, 2], [3]]}
    for name, values in arrays.items():
        writer.add_array(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "arrays.gguf"
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types
        assert ours.field(name) == field.contents()
    assert ours.field("strings") == arrays["strings"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[: path.read_bytes().index(b"zw") + 1])
    with pytest.raises(ValueError, match=r"cut\.gguf: not a readable GGUF file"):
        GGUFFile(cut)


@pytest.mark.parametrize("kind", [0, 4, 8, 9])  # bytes, numbers, strings, arrays
def test_an_array_that_claims_more_than_the_file_holds_is_refused_at_once(tmp_path, kind):
    name = b"general.architecture"
    path = tmp_path / "hostile.gguf"
    for count in (10**5, 2**40, 2**64 - 1):
        array = struct.pack("<IIQ", 9, kind, count)
        path.write_bytes(
            struct.pack("<IIQQQ", gguf.GGUF_MAGIC, 3, 0, 1, len(name)) + name + array + bytes(64)
        )
        began = time.monotonic()
        with pytest.raises(UserError, match=r"hostile\.gguf: not a readable GGUF file"):
            GGUFFile(path)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (b"token_embd.weight", 2**32 + 16, "not a readable GGUF file"),  # the first size
        (b"output_norm.weight", 1 << 63, "not a readable GGUF file"),
        (b"llama.block_count", 2**31, "num_layers is 2147483648: expected 1 to 1000"),
        (b"llama.embedding_length", 0, "hidden_size is 0: expected at least 1"),
    ],
)
def test_numbers_of_the_header_are_checked(tmp_path, field, value, message):
    _, config, params = load_golden("smollm2", tmp_path)
    path = write_gguf(tmp_path / "a.gguf", config, gguf_tensors(config, params))
    content = bytearray(path.read_bytes())
    at = content.index(field)
    width = 4 if field.startswith(b"llama") else 8
    at += len(field) + 4  # after the type, or the number of axes
    content[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(path)


def test_tensors_lie_one_after_the_other(tmp_path):
    """A type of half the size leaves a gap, and would be read from the right bytes wrongly."""
    _, config, params = load_golden("smollm2", tmp_path)
    path = write_gguf(tmp_path / "a.gguf", config, gguf_tensors(config, params))
    content = bytearray(path.read_bytes())
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert content[at] == gguf.GGMLQuantizationType.F32
    content[at] = gguf.GGMLQuantizationType.F16
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gguf: .* lies at byte \d+, expected \d+"):
        load_weights(path)


def test_every_wrong_tensor_is_named(tmp_path):
    _, config, params = load_golden("smollm2", tmp_path)
    tensors = gguf_tensors(config, params)
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_k.weight"][:6]
    tensors["blk.0.strange.weight"] = tensors.pop("blk.0.ffn_up.weight")
    path = write_gguf(tmp_path / "wrong.gguf", config, tensors)
    with pytest.raises(ValueError, match="wrong.gguf") as error:
        load_weights(path)
    for part in (
        "blk.1.attn_k.weight has shape (6, 16), expected (8, 16)",
        "unknown blk.0.strange.weight",
        "missing blk.0.ffn_up.weight",
    ):
        assert part in str(error.value)
    tensors = gguf_tensors(config, params)
    tensors["output_norm.weight"] = np.ones(16, np.int32)
    with pytest.raises(ValueError, match=r"output_norm.weight: Dequantization for I32"):
        load_weights(write_gguf(tmp_path / "integers.gguf", config, tensors))


def test_other_files_are_refused(tmp_path):
    _, config, params = load_golden("smollm2", tmp_path)
    tensors = gguf_tensors(config, params)
    other = write_gguf(tmp_path / "other.gguf", config, tensors, architecture="gemma2")
    known = "'llama', 'qwen2', 'qwen3', 'gemma3'"
    with pytest.raises(ValueError, match=f"'gemma2': expected one of {known}"):
        load_weights(other)
    (tmp_path / "text.gguf").write_text("this is not a model, but it is long enough to look like")
    with pytest.raises(ValueError, match="text.gguf: not a readable GGUF file"):
        load_weights(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="absent.gguf: no such GGUF file"):
        load_weights(tmp_path / "absent.gguf")


@pytest.mark.slow
def test_smollm2_predicts_what_pytorch_predicts(smollm2_path):
    decoder = Decoder(*load_weights(smollm2_path))
    predict = jax.jit(
        lambda decoder, tokens, lengths: jax.nn.log_softmax(
            decoder.head()(decoder.hidden(tokens, lengths)[np.arange(tokens.shape[0]), lengths - 1])
        )
    )
    cases = json.loads((GOLDENS / "smollm2_top5.json").read_text("utf-8"))["predictions"]
    lengths = np.array([len(case["ids"]) for case in cases])
    tokens = np.zeros((len(cases), lengths.max()), np.int32)
    for row, case in zip(tokens, cases, strict=True):
        row[: len(case["ids"])] = case["ids"]
    log_probs = np.asarray(predict(decoder, tokens, lengths))
    for row, case in zip(log_probs, cases, strict=True):
        assert np.argsort(-row)[:5].tolist() == case["top_ids"], case["prompt"]
        np.testing.assert_allclose(row[case["top_ids"]], case["log_probs"], atol=1e-3)


@pytest.mark.slow
def test_gemma3_computes_what_transformers_computes(gemma_path):
    """At the end of texts, one of which is longer than the sliding window."""
    decoder = Decoder(*load_weights(gemma_path))
    golden = np.load(GOLDENS / "gemma3_logits.npz")
    assert golden["lengths"].max() > decoder.config.sliding_window

    @jax.jit
    def logits(decoder, tokens, lengths, positions_NxP):
        hidden_NxSxD = decoder.hidden(tokens, lengths)
        rows = np.arange(len(positions_NxP))[:, None]
        return decoder.head()(hidden_NxSxD[rows, positions_NxP])

    computed = logits(decoder, *(golden[name] for name in ("tokens", "lengths", "positions")))
    chosen = np.take_along_axis(np.asarray(computed), golden["ids"], axis=-1)
    np.testing.assert_allclose(chosen, golden["logits"], atol=1e-3, rtol=0)
