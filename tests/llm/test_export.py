"""Exports: adapters for PEFT and back, merged checkpoints, bad folders.

What transformers and PEFT make of them is in test_families.
"""

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forked import Script
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.checkpoints.export import (
    export_decoder,
    read_peft_adapter,
    write_hugging_face,
    write_peft_adapter,
)
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.lora import LoRAConfig, adapter_shapes, merge_adapters
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.run_folder import COMMAND, RunFolder, inputs_of

ROOT = Path(__file__).parents[2]
# Heads and kv heads differ, head_dim is no power of two.
CONFIG = DecoderConfig(29, 24, 40, 2, 4, 2, 6, rope_theta=500.0, max_positions=64)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LORA = LoRAConfig(rank=3, alpha=12.0, dropout=0.05, targets="(q|v|o|gate|down)_proj")
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 13), dtype=np.int32)
QUERY_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def make_params(config=CONFIG, dtype=jnp.float32):
    """Random parameters, norms included: equal norms would hide that two were exchanged."""
    draw = np.random.default_rng(1).normal
    return {
        path: jnp.asarray(draw(float(path.endswith("_norm")), 0.2, shape), dtype)
        for path, shape in config.parameter_shapes.items()
    }


def make_adapters(config=CONFIG, lora=LORA):
    """Random adapters; fresh ones have a zero B, which hides every mistake."""
    draw = np.random.default_rng(2).normal
    return {
        name: {
            part: jnp.asarray(draw(0, 0.2, shape), jnp.float32) for part, shape in shapes.items()
        }
        for name, shapes in adapter_shapes(config, lora).items()
    }


def logits_of(config, params, lora=None, adapters=None):
    decoder = Decoder(config, params, lora=lora, adapters=adapters)
    return np.asarray(forward(decoder, TOKENS))


@jax.jit
def forward(decoder, tokens):
    return decoder.head()(decoder.hidden(tokens, jnp.array([13, 13])))


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_adapter(folder, lora=LORA):
    write_peft_adapter(folder, CONFIG, lora, make_adapters(lora=lora), base_model="some/base")
    return folder


def test_adapters_come_back_bit_for_bit(tmp_path):
    lora, adapters = read_peft_adapter(write_adapter(tmp_path / "adapter"), CONFIG)
    assert_same_trees(adapters, make_adapters())
    assert dataclasses.replace(lora, targets=LORA.targets) == LORA
    assert set(adapter_shapes(CONFIG, lora)) == set(adapters)


def test_adapters_of_upper_layers_come_back_with_zeros_below(tmp_path):
    upper = dataclasses.replace(LORA, first_layer=1)
    folder = write_adapter(tmp_path / "adapter", upper)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["layers_to_transform"] == [1]
    assert all(".layers.1." in name for name in load_file(folder / "adapter_model.safetensors"))
    lora, adapters = read_peft_adapter(folder, CONFIG)
    assert dataclasses.replace(lora, targets=LORA.targets) == upper
    assert_same_trees(adapters, jax.tree.map(lambda x: x.at[0].set(0), make_adapters()))


def test_adapter_layout(tmp_path):
    folder = write_adapter(tmp_path / "deep" / "adapter")
    tensors, adapters = load_file(folder / "adapter_model.safetensors"), make_adapters()
    assert len(tensors) == 2 * 2 * 5
    assert tensors[QUERY_A].shape == (3, 24)
    np.testing.assert_array_equal(tensors[QUERY_A], adapters["q_proj"]["a"][1].T)
    down_b = tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    np.testing.assert_array_equal(down_b, adapters["down_proj"]["b"][0].T)
    fields = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 12.0,
        "lora_dropout": 0.05,
        "target_modules": ["down_proj", "gate_proj", "o_proj", "q_proj", "v_proj"],
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "inference_mode": True,
    }
    assert expected.items() <= fields.items()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_merged_logits_equal_unmerged_ones():
    params, adapters = make_params(), make_adapters()
    before = {path: np.array(value) for path, value in params.items()}
    merged = merge_adapters(params, adapters, LORA)
    unmerged = logits_of(CONFIG, params, LORA, adapters)
    largest = np.abs(unmerged).max()
    assert np.abs(logits_of(CONFIG, merged) - unmerged).max() < 2e-5 * largest
    assert np.abs(logits_of(CONFIG, params) - unmerged).max() > 0.1 * largest
    assert_same_trees(params, before)
    for path, value in merged.items():
        assert (value is params[path]) == (path.removeprefix("layers/") not in adapters), path


def test_merging_rounds_once_to_the_dtype_of_the_weights():
    params = make_params(dtype=jnp.bfloat16)
    merged = merge_adapters(params, make_adapters(), LORA)["layers/q_proj"]
    adapter = {part: np.asarray(x, np.float64) for part, x in make_adapters()["q_proj"].items()}
    exact = np.asarray(params["layers/q_proj"], np.float64) + 4 * adapter["a"] @ adapter["b"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8)


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoint_tensors(tmp_path, config, dtype, tokenizer):
    params = make_params(config)
    write_hugging_face(tmp_path / "m", config, params, tokenizer, dtype=dtype)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    own = {path: np.asarray(value.astype(dtype)) for path, value in params.items()}
    expected = {
        "model.embed_tokens.weight": own["embedding"],
        "model.norm.weight": own["final_norm"],
        **({} if config.tie_embeddings else {"lm_head.weight": own["lm_head"].T}),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        expected[f"{layer}.input_layernorm.weight"] = own["layers/attn_norm"][i]
        expected[f"{layer}.post_attention_layernorm.weight"] = own["layers/mlp_norm"][i]
        for name in "qkvo":
            expected[f"{layer}.self_attn.{name}_proj.weight"] = own[f"layers/{name}_proj"][i].T
        for name in ("gate", "up", "down"):
            expected[f"{layer}.mlp.{name}_proj.weight"] = own[f"layers/{name}_proj"][i].T
    assert set(tensors) == set(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == jnp.dtype(dtype), name
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


def test_checkpoint_config_and_tokenizer(tmp_path, tokenizer):
    write_hugging_face(tmp_path, TIED, make_params(TIED), tokenizer, dtype="bfloat16")
    fields = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    assert expected.items() <= fields.items()
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == expected["rope_parameters"]
    assert (config.max_position_embeddings, config.rms_norm_eps) == (64, 1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("star</s>wars") == tokenizer.encode("star</s>wars")
    assert again.pad_token_id == 2


def test_transformers_4_knows_what_is_written_of_a_tokenizer(tmp_path, tokenizer):
    """Release 4.57 refuses the class TokenizersBackend and a list of extra_special_tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    write_hugging_face(tmp_path, TIED, make_params(TIED), tokenizer, dtype="bfloat16")
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<think>"]
    assert "extra_special_tokens" not in fields
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("a<think>b") == tokenizer.encode("a<think>b")
    assert again.extra_special_tokens == ["<think>"]


def test_a_decoder_is_exported_in_every_format(tmp_path, tokenizer):
    params, adapters = make_params(dtype=jnp.bfloat16), make_adapters()
    decoder = Decoder(CONFIG, params, lora=LORA, adapters=adapters)
    assert_same_trees(decoder.arrays(), (params, adapters))
    for kind in ("peft", "merged", "base"):
        line = export_decoder(
            tmp_path / kind,
            decoder,
            tokenizer,
            kind=kind,
            dtype="float32",
            base_model="some/base",
        )
        assert str(tmp_path / kind) in line
    assert_same_trees(read_peft_adapter(tmp_path / "peft", CONFIG)[1], adapters)
    base, merged = (load_file(tmp_path / kind / "model.safetensors") for kind in ("base", "merged"))
    query = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(base[query], params["layers/q_proj"][1].T.astype(np.float32))
    # A wider export keeps what the sum in bfloat16 would round away.
    wide = {path: value.astype(jnp.float32) for path, value in params.items()}
    expected = merge_adapters(wide, adapters, LORA)["layers/q_proj"][1].T
    np.testing.assert_array_equal(merged[query], expected)


def damage_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY_A), f"missing {QUERY_A}"),
        (lambda t: t.update(strange=t[QUERY_A]), "unknown strange"),
        (
            lambda t: t.update({QUERY_A: t[QUERY_A][:, :7].copy()}),
            f"{QUERY_A} has shape (3, 7), expected (3, 24)",
        ),
        (
            lambda t: t.update({QUERY_A: t[QUERY_A][:2].copy()}),
            f"{QUERY_A} has shape (2, 24), expected (3, 24)",
        ),
    ],
)
def test_every_wrong_tensor_is_named(tmp_path, change, message):
    damage_tensors(write_adapter(tmp_path / "adapter"), change)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: ") as error:
        read_peft_adapter(tmp_path / "adapter", CONFIG)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("r"), "field 'r' is missing"),
        (lambda f: f.update(use_dora=True), "only plain LoRA"),
        (lambda f: f.update(target_modules="all-linear"), "target_modules is 'all-linear'"),
        (lambda f: f.update(r=0), "rank is 0: expected at least 1"),
        (lambda f: f.update(layers_to_transform=[0, 2]), r"layers_to_transform is \[0, 2\]"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, message):
    path = write_adapter(tmp_path / "adapter") / "adapter_config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{message}"):
        read_peft_adapter(path.parent, CONFIG)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        read_peft_adapter(tmp_path, CONFIG)
    path = write_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_peft_adapter(path.parent, CONFIG)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no such file"):
        read_peft_adapter(path.parent, CONFIG)


def test_a_folder_is_never_replaced_and_never_half_written(tmp_path, tokenizer):
    folder = tmp_path / "taken"
    folder.mkdir()
    write_adapter(folder)  # an empty one may be used
    with pytest.raises(ValueError, match="taken exists and is not an empty folder"):
        write_adapter(folder)
    params = make_params()
    too_large = params | {"final_norm": params["final_norm"] + 1e6}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values.*float16"):
        write_hugging_face(tmp_path / "x", CONFIG, too_large, tokenizer, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_bad_input_is_named(tmp_path, tokenizer):
    params, adapters = make_params(), make_adapters()
    less = {path: value for path, value in params.items() if path != "lm_head"}
    with pytest.raises(ValueError, match="missing lm_head"):
        write_hugging_face(tmp_path, CONFIG, less, tokenizer, dtype="float32")
    with pytest.raises(ValueError, match="dtype is .*: expected one of 'float32"):
        write_hugging_face(tmp_path, CONFIG, params, tokenizer, dtype="int8")
    uneven = dataclasses.replace(CONFIG, num_heads=10)
    with pytest.raises(
        ValueError, match=r"hidden size \(24\) is not a multiple of .* heads \(10\)"
    ):
        write_hugging_face(tmp_path, uneven, make_params(uneven), tokenizer, dtype="float32")
    normed = dataclasses.replace(CONFIG, qk_norm=True)
    with pytest.raises(ValueError, match="a 'llama' cannot say that qk_norm is True"):
        write_hugging_face(tmp_path, normed, make_params(normed), tokenizer, dtype="float32")
    other = dataclasses.replace(LORA, rank=4)
    with pytest.raises(ValueError, match=r"q_proj/a has shape \(2, 24, 3\), expected \(2, 24, 4"):
        write_peft_adapter(tmp_path, CONFIG, other, adapters, base_model="")
    with pytest.raises(ValueError, match=r"'z_proj', but there is no parameter 'layers/z_proj'"):
        merge_adapters(params, {"z_proj": adapters["q_proj"]}, LORA)
    with pytest.raises(ValueError, match=r"layers/k_proj has shape \(2, 24, 12\)"):
        merge_adapters(params, {"k_proj": adapters["q_proj"]}, LORA)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_path")
def test_the_script(tmp_path):
    """Adapters of a run that trained for no step; the second time the folder is taken."""
    config_file = f"{ROOT}/configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", config_file)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    run = Experiment(quickstart.get_config("debug,alpha=0.0,run=fresh"), tmp_path)
    prepare(run.config.data, tmp_path / "data")
    made_from = Provenance("LLM run", COMMAND, run.training_inputs)
    RunFolder(run.directory).begin(made_from, run.config.to_json_best_effort())
    _, state, _ = run.initial_state()
    with Checkpoints(run.directory / "checkpoints") as checkpoints:
        checkpoints.save(state._replace(step=state.step + 1), {"inputs": inputs_of(made_from)})
    output = tmp_path / "exported"
    command = [f"{ROOT}/launch/export.py", f"--config={config_file}:debug,alpha=0.0,run=fresh"]
    command += [f"--workdir={tmp_path}", "--format=peft", f"--output={output}"]
    done = Script(command, {}).completed()
    assert done.returncode == 1
    assert "llm/fresh is unfinished, it has 1 of " in done.stderr
    command.append("--config.inference.unfinished=true")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0] == str(output)
    assert "PeftModel.from_pretrained" in done.stdout.splitlines()[1]
    # The base is a name of ours, which PEFT would look for on the Hub.
    adapter_config = json.loads((output / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] is None
    lora, adapters = read_peft_adapter(output, run.pretrained[0])
    assert lora.rank == run.config.lora.rank
    exported = jax.tree.map(  # those below the first adapted layer are not in the file
        lambda a: a.at[: run.config.lora.first_layer].set(0),
        nnx.to_pure_dict(state.params)["adapters"],
    )
    assert_same_trees(adapters, exported)
    assert Provenance.load(output).inputs["run.step"] == 1
    done = Script(command, {}).completed()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("choose another or delete it")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_written_weights_are_as_private_as_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        folder = write_adapter(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
