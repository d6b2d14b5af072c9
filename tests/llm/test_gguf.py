"""Loading GGUF files: parity with PyTorch's Llama, dtypes, bad files."""

import importlib.util
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.gguf import load_decoder, load_gguf
from tca4rec_jax.llm.lora import LoRAConfig

GOLDENS = Path(__file__).parent.parent / "goldens"
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_golden(name):
    with np.load(GOLDENS / "tiny_llama.npz") as golden:
        return {key[len(name) + 1 :]: golden[key] for key in golden if key.startswith(name + "/")}


def gguf_tensors(golden, heads=4):
    """The tensors that llama.cpp's converter writes for Hugging Face weights."""
    kv_heads = golden["weights/model.layers.0.self_attn.k_proj.weight"].shape[0] // 6
    tensors = {}
    for key, value in golden.items():
        if not key.startswith("weights/"):
            continue
        name = key.removeprefix("weights/")
        if name in TOP_NAMES:
            tensors[TOP_NAMES[name]] = value
            continue
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if part.endswith(("q_proj", "k_proj")):
            count = heads if part.endswith("q_proj") else kv_heads
            halves = value.reshape(count, 2, value.shape[0] // count // 2, value.shape[1])
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        tensors[f"blk.{layer}.{LAYER_NAMES[part]}.weight"] = value
    return tensors


def write_gguf(path, tensors, *, kv_heads, architecture="llama", kind=None):
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(24)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(29)
    writer.add_token_list([f"t{i}" for i in range(29)])
    for name, value in tensors.items():
        if kind is None or value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            data = gguf.quantize(value, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def golden_file(folder, name, **options):
    golden = tiny_golden(name)
    kv_heads = {"grouped": 2, "untied": 4}[name]
    path = write_gguf(folder / f"{name}.gguf", gguf_tensors(golden), kv_heads=kv_heads, **options)
    return path, golden


@pytest.mark.parametrize("name", ["grouped", "untied"])
def test_logits_equal_transformers(tmp_path, name):
    path, golden = golden_file(tmp_path, name)
    decoder = load_decoder(path)
    assert decoder.config.tie_embeddings == (name == "grouped")
    hidden = decoder.hidden(golden["tokens"], np.array([13, 13]))
    np.testing.assert_allclose(decoder.logits(hidden), golden["logits"], atol=1e-5, rtol=1e-5)


def test_fresh_adapters_change_nothing(tmp_path):
    path, golden = golden_file(tmp_path, "grouped")
    decoder = load_decoder(path, lora=LoRAConfig(rank=2), seed=3)
    assert set(decoder.adapters) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    hidden = decoder.hidden(golden["tokens"], np.array([13, 13]), dropout_key=jax.random.key(0))
    np.testing.assert_allclose(decoder.logits(hidden), golden["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(gguf.GGMLQuantizationType.F16, 1e-3), (gguf.GGMLQuantizationType.BF16, 1e-2)],
)
def test_half_precision_tensors(tmp_path, kind, tolerance):
    exact, _ = golden_file(tmp_path, "untied")
    _, expected = load_gguf(exact)
    half, _ = golden_file(tmp_path, "untied", kind=kind)
    _, params = load_gguf(half)
    for name, value in params.items():
        np.testing.assert_allclose(value, expected[name], rtol=tolerance, atol=1e-4, err_msg=name)
    assert np.any(params["embedding"] != expected["embedding"])


def test_every_wrong_tensor_is_named(tmp_path):
    tensors = gguf_tensors(tiny_golden("grouped"))
    tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_k.weight"][:6]
    tensors["blk.0.strange.weight"] = tensors.pop("blk.0.ffn_up.weight")
    path = write_gguf(tmp_path / "wrong.gguf", tensors, kv_heads=2)
    with pytest.raises(ValueError, match="wrong.gguf") as error:
        load_gguf(path)
    for part in (
        "blk.1.attn_k.weight has shape (24, 6), expected (24, 12)",
        "unknown tensor blk.0.strange.weight",
        "missing tensor blk.0.ffn_up.weight",
    ):
        assert part in str(error.value)


def test_other_files_are_refused(tmp_path):
    tensors = gguf_tensors(tiny_golden("grouped"))
    other = write_gguf(tmp_path / "other.gguf", tensors, kv_heads=2, architecture="qwen2")
    with pytest.raises(ValueError, match="'qwen2', expected 'llama'"):
        load_gguf(other)
    (tmp_path / "text.gguf").write_text("this is not a model, but it is long enough to look like")
    with pytest.raises(ValueError, match="text.gguf: not a readable GGUF file"):
        load_gguf(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="absent.gguf: no such GGUF file"):
        load_gguf(tmp_path / "absent.gguf")


@pytest.mark.slow
def test_smollm2_predicts_what_pytorch_predicts(smollm2_path):
    decoder = load_decoder(smollm2_path)
    predict = jax.jit(
        lambda decoder, tokens, lengths: jax.nn.log_softmax(
            decoder.logits(decoder.hidden(tokens, lengths)[np.arange(tokens.shape[0]), lengths - 1])
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


def test_live_comparison_with_pytorch(tmp_path):
    """A seed that is in no golden; needs PyTorch, which nothing else here does."""
    pytest.importorskip("torch", reason="PyTorch, a test-only oracle, is not installed")
    spec = importlib.util.spec_from_file_location("make", GOLDENS / "make_llama_golden.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    golden = make.tiny_llama(11, kv_heads=2, tied=True)
    path = write_gguf(tmp_path / "live.gguf", gguf_tensors(golden), kv_heads=2)
    config, params = load_gguf(path)
    decoder = Decoder(config, {name: jax.numpy.asarray(value) for name, value in params.items()})
    logits = decoder.logits(decoder.hidden(golden["tokens"], np.array([13, 13])))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=1e-5)
