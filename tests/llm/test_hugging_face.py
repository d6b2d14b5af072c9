"""Loading Hugging Face folders: shards of files and devices, dtypes, fields, bad folders.

That the families' models compute what they should is in test_families.
"""

import json

import jax
import jax.numpy as jnp
import make_decoder_golden as goldens
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load, save_file

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.checkpoints import hugging_face, loading
from tca4rec_jax.llm.checkpoints.hugging_face import read_config
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.llm.config import RopeScaling, logical_axes
from tca4rec_jax.llm.families import config_fields, decoder_config
from tca4rec_jax.llm.tokenizer import load_tokenizer

FIELDS = {
    "model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 500.0, "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip
QUERY = "model.layers.1.self_attn.q_proj.weight"
LLAMA3 = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def weights():
    """Tensors of the golden Llama that FIELDS describes."""
    return load(goldens.read_model("smollm2")["model.safetensors"].tobytes())


def write_folder(folder, weights, fields=FIELDS, shards=1):
    folder.mkdir(parents=True)
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


def ours(weights):
    """The parameters that they are, put together by hand."""
    layers = [f"model.layers.{layer}" for layer in range(2)]
    modules = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    modules |= {f"{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"}
    modules |= {f"{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": weights["model.norm.weight"],
        **{
            f"layers/{name}": np.stack([weights[f"{layer}.{module}.weight"].T for layer in layers])
            for name, module in modules.items()
        },
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("piece_bytes", [70, 1 << 20])
def test_every_value_is_in_its_place(tmp_path, weights, shards, piece_bytes, monkeypatch):
    monkeypatch.setattr(loading, "PIECE_BYTES", piece_bytes)
    _, params = load_weights(write_folder(tmp_path / "model", weights, shards=shards))
    jax.tree.map(np.testing.assert_array_equal, params, ours(weights))


def test_parameters_are_loaded_onto_their_shards(tmp_path, weights):
    """Layers, rows and columns split; what two devices share is one piece of memory."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    split = {"layers": None, "heads": "model", "feed_forward": "model", "kv_heads": None}

    def sharding(_, path):
        return NamedSharding(mesh, P(*(split.get(axis) for axis in logical_axes(path))))

    folder = write_folder(tmp_path / "model", weights)
    _, params = load_weights(folder, sharding=sharding)
    jax.tree.map(np.testing.assert_array_equal, params, ours(weights))
    shapes = {path: value.sharding.shard_shape(value.shape) for path, value in params.items()}
    assert shapes["layers/q_proj"] == (2, 16, 8)
    assert shapes["layers/down_proj"] == (2, 12, 16)
    _, params = load_weights(folder, sharding=lambda *_: NamedSharding(mesh, P()))
    for path, value in params.items():
        places = {shard.data.unsafe_buffer_pointer() for shard in value.addressable_shards}
        assert len(places) == 1, path


def test_only_layers_that_are_asked_for_are_read(tmp_path, weights, monkeypatch):
    read, names = hugging_face._read, set()
    monkeypatch.setattr(
        hugging_face, "_read", lambda file, name, index: names.add(name) or read(file, name, index)
    )
    folder = write_folder(tmp_path / "model", weights)
    config, params = load_weights(folder, num_layers=1)
    assert config.num_layers == 1
    assert names == {name for name in weights if ".layers.1." not in name}
    for path, value in ours(weights).items():
        expected = value[:1] if path.startswith("layers/") else value
        np.testing.assert_array_equal(params[path], expected, err_msg=path)
    with pytest.raises(ValueError, match="num_layers is 3, but the model has 2"):
        load_weights(folder, num_layers=3)


def test_a_head_written_twice_old_tables_and_bfloat16_weights(tmp_path, weights):
    weights = {name: value.astype(jnp.bfloat16) for name, value in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    folder = write_folder(tmp_path / "model", weights)
    config, params = load_weights(folder, jnp.bfloat16)
    assert config.tie_embeddings
    assert "lm_head" not in params
    assert params["layers/q_proj"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["layers/q_proj"][1], weights[QUERY].T)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 500.0, "rope_scaling": None}, (500.0, None)),
        ({"rope_theta": None}, (10000.0, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, (7.0, None)),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            (9.0, RopeScaling("linear", 2.0)),
        ),
        (
            {"rope_theta": 9.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            (9.0, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, **LLAMA3}},
            (9.0, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def test_both_spellings_of_the_rotary_fields(rope, expected):
    fields = {key: value for key, value in FIELDS.items() if not key.startswith("rope")}
    config = decoder_config(fields | {k: v for k, v in rope.items() if v is not None})
    assert (config.rope_theta, config.rope_scaling) == expected
    assert decoder_config(config_fields(config)) == config
    # What transformers before version 5 reads says the same.
    old = {k: v for k, v in config_fields(config).items() if k != "rope_parameters"}
    assert decoder_config(old) == config


@pytest.mark.parametrize(
    ("change", "window", "full_layers"),
    [
        ({"model_type": "mistral"}, 4096, ()),  # the family's default
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 5}, None, ()),
        ({"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True}, None, ()),
        (
            {"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True,
             "max_window_layers": 0},
            5, (),
        ),
        (
            {"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True,
             "layer_types": ["sliding_attention", "full_attention"]},
            5, (1,),
        ),
    ],
)  # fmt: skip
def test_sliding_windows(change, window, full_layers):
    config = decoder_config(FIELDS | change)
    assert (config.sliding_window, config.full_layers) == (window, full_layers)
    assert decoder_config(config_fields(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"config.json: model_type is 'gpt2'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"num_attention_heads": "4"}, "'num_attention_heads' expected int, got str"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types.*chunked_attention",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2': expected one of .*gemma3_text"),
        (
            {"model_type": "gemma3_text", "final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "sliding_attention is 'linear', not default",
        ),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_a_config_that_is_not_supported_is_named(tmp_path, change, message):
    fields = {k: v for k, v in (FIELDS | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        read_config(write_folder(tmp_path / "model", {}, fields))


def test_every_tensor_that_does_not_fit_is_named(tmp_path, weights):
    weights["extra.weight"] = np.zeros(2, np.float32)
    weights[QUERY] = weights[QUERY][:5].copy()
    del weights["model.norm.weight"]
    folder = write_folder(tmp_path / "model", weights)
    with pytest.raises(ValueError, match=r"unknown extra.weight") as error:
        load_weights(folder)
    assert f"{QUERY} has shape (5, 16), expected (16, 16)" in str(error.value)
    assert "missing model.norm.weight" in str(error.value)
    weights[QUERY] = np.zeros((16, 16), np.int8)
    with pytest.raises(ValueError, match=rf"{QUERY} is I8, supported are F32, F16, BF16"):
        load_weights(write_folder(tmp_path / "quantised", weights))


def test_files_that_cannot_be_read_are_named(tmp_path, weights):
    folder = write_folder(tmp_path / "model", weights)
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable"):
        load_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: no such file"):
        load_weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a readable JSON file"):
        read_config(folder)
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        read_config(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../model/model-1.safetensors", "{folder}/model-1.safetensors"])
def test_an_index_does_not_leave_its_folder(tmp_path, weights, name):
    folder = write_folder(tmp_path / "model", weights, shards=2)
    path = folder / "model.safetensors.index.json"
    index = path.read_text().replace("model-1.safetensors", name.format(folder=folder))
    path.write_text(index)
    with pytest.raises(UserError, match=r"index\.json: '.*model-1.* leads to .* copy it there"):
        load_weights(folder)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "["]
)
def test_a_malformed_index_is_named(tmp_path, weights, index):
    folder = write_folder(tmp_path / "model", weights, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        load_weights(folder)


def test_links_lead_to_the_blobs_of_a_cache_of_the_hub_and_nowhere_else(tmp_path, weights):
    folder = write_folder(tmp_path / "models--a" / "snapshots" / "b", weights, shards=2)
    file = folder / "model-1.safetensors"
    for place, refused in (("models--a/blobs", False), ("models--a/other", True)):
        (tmp_path / place).mkdir()
        file.resolve().rename(tmp_path / place / "1234")
        file.unlink(missing_ok=True)
        file.symlink_to(tmp_path / place / "1234")
        if refused:
            with pytest.raises(UserError, match=r"model-1\.safetensors' leads to"):
                load_weights(folder)
        else:
            jax.tree.map(np.testing.assert_array_equal, load_weights(folder)[1], ours(weights))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0, "head_dim": None},
        {"hidden_size": "16"},
        {"rms_norm_eps": float("nan")},
        {"rope_scaling": [1]},
        {"max_position_embeddings": 0},
    ],
)
def test_a_malformed_config_is_refused_in_one_line(tmp_path, weights, changes):
    folder = write_folder(tmp_path / "model", weights, FIELDS | changes)
    with pytest.raises(UserError, match=r"config\.json: ") as error:
        load_weights(folder)
    assert len(str(error.value).splitlines()) == 1
