"""Loading Hugging Face folders: parity with PyTorch's Llama, shards, dtypes, bad folders."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.export import write_hugging_face
from tca4rec_jax.llm.hugging_face import load_hugging_face, read_config
from tca4rec_jax.llm.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "goldens" / "tiny_llama.npz"
FIELDS = {
    "model_type": "llama", "vocab_size": 29, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 500.0, "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
QUERY = "model.layers.1.self_attn.q_proj.weight"


def golden(name):
    with np.load(GOLDEN) as file:
        values = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(name)}
    weights = {k.removeprefix("weights/"): v for k, v in values.items() if k.startswith("weights/")}
    return weights, values["tokens"], values["logits"]


def write_folder(folder, weights, fields=FIELDS, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: weights[name] for name in names if weight_map[name] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits_of(folder, tokens):
    config, params = load_hugging_face(folder)
    decoder = Decoder(config, {path: jnp.asarray(value) for path, value in params.items()})
    lengths = jnp.full(len(tokens), tokens.shape[1])
    return jax.jit(lambda t: decoder.logits(decoder.hidden(t, lengths)))(jnp.asarray(tokens))


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_equal_pytorch_tied_and_grouped(tmp_path, shards):
    weights, tokens, logits = golden("grouped")
    folder = write_folder(tmp_path / "model", weights, shards=shards)
    np.testing.assert_allclose(logits_of(folder, tokens), logits, rtol=1e-4, atol=1e-4)


def test_logits_equal_pytorch_untied(tmp_path):
    weights, tokens, logits = golden("untied")
    kv_heads = weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // 6
    # As transformers 5 writes the rotary base; and a buffer that old checkpoints hold.
    fields = {key: value for key, value in FIELDS.items() if not key.startswith("rope")}
    fields |= {"num_key_value_heads": kv_heads, "tie_word_embeddings": False}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    folder = write_folder(tmp_path / "model", weights, fields)
    np.testing.assert_allclose(logits_of(folder, tokens), logits, rtol=1e-4, atol=1e-4)


def test_a_head_written_twice_and_bfloat16_weights(tmp_path):
    weights, _, _ = golden("grouped")
    weights = {name: value.astype(jnp.bfloat16) for name, value in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    folder = write_folder(tmp_path / "model", weights)
    config, params = load_hugging_face(folder, jnp.bfloat16)
    assert config.tie_embeddings
    assert "lm_head" not in params
    assert params["layers/q_proj"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["layers/q_proj"][1], weights[QUERY].T)


def test_what_was_exported_comes_back_bit_for_bit_with_its_tokenizer(tmp_path, tokenizer):
    config, params = load_hugging_face(write_folder(tmp_path / "model", golden("grouped")[0]))
    write_hugging_face(tmp_path / "again", config, params, tokenizer, dtype="float32")
    config_again, again = load_hugging_face(tmp_path / "again")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert load_tokenizer(tmp_path / "again").encode("hello") == tokenizer.encode("hello")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"config.json: model_type 'gpt2'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 32}, "sliding_window is 32"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_a_config_that_is_not_supported_is_named(tmp_path, change, message):
    fields = {k: v for k, v in (FIELDS | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        read_config(write_folder(tmp_path / "model", golden("grouped")[0], fields))


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    weights, _, _ = golden("grouped")
    weights["extra.weight"] = np.zeros(2, np.float32)
    weights[QUERY] = weights[QUERY][:5].copy()
    del weights["model.norm.weight"]
    folder = write_folder(tmp_path / "model", weights)
    with pytest.raises(ValueError, match=r"unknown extra.weight") as error:
        load_hugging_face(folder)
    assert f"{QUERY} has shape (5, 24), expected (24, 24)" in str(error.value)
    assert "missing model.norm.weight" in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = write_folder(tmp_path / "model", golden("grouped")[0])
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable"):
        load_hugging_face(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable"):
        load_hugging_face(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable as JSON"):
        read_config(folder)
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        read_config(tmp_path / "nothing")
