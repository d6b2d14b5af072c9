"""Reads a Hugging Face folder (config.json, safetensors) into the decoder's parameter layout.

Their matrices are [out, in], one tensor per layer; ours are [in, out] and stacked over layers.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tca4rec_jax.llm.config import DecoderConfig

# Our parameter path, or layer parameter -> Hugging Face module.
TOP_MODULES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Architectures that are this decoder, where none of the fields below says otherwise.
MODEL_TYPES = ("llama", "mistral")
# Fields that change what a model computes, at the only values known here (or absent).
KNOWN_FIELDS = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


def read_config(folder: str | Path) -> DecoderConfig:
    """The architecture in config.json.

    Raises:
      ValueError: no such file, an architecture or a field's value that is not supported, or a field
        that is missing; names the file and the field.
    """
    path = Path(folder) / CONFIG
    fields = _read_json(path)
    if fields.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type {fields.get('model_type')!r}, supported are {MODEL_TYPES}"
        )
    for name, values in KNOWN_FIELDS.items():
        if fields.get(name, values[0]) not in values:
            raise ValueError(f"{path}: {name} is {fields[name]!r}, supported is {values[0]!r}")
    rope = fields.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{path}: rope_parameters.rope_type is {rope['rope_type']!r}, supported is 'default'"
        )
    try:
        heads = fields["num_attention_heads"]
        return DecoderConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            # transformers 5 writes rope_parameters, older versions rope_theta.
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10000.0),
            rms_norm_eps=fields["rms_norm_eps"],
            tie_embeddings=fields.get("tie_word_embeddings", False),
            max_positions=fields["max_position_embeddings"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: field {error} is missing") from error


def load_hugging_face(
    folder: str | Path, dtype: jnp.dtype = jnp.float32
) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """Config and host parameters (by path, layers stacked, matrices [in, out]) of a folder.

    One file or a sharded index; float32, bfloat16 or float16. Tensors are read one by one, so the
    host holds the parameters and one tensor more.

    Raises:
      ValueError: as `read_config`, an unreadable file, or every tensor that is missing, unknown or
        of another shape, by name.
    """
    folder = Path(folder)
    config = read_config(folder)
    params = {path: np.empty(shape, dtype) for path, shape in config.parameter_shapes.items()}
    expected = tensor_places(config)
    found, problems = set(), []
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name not in expected:
                        problems += [] if _is_redundant(name, config) else [f"unknown {name}"]
                        continue
                    found.add(name)
                    problems += _fill(params, *expected[name], name, tensors)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    problems += [f"missing {name}" for name in expected if name not in found]
    if problems:
        raise ValueError(f"{folder}: tensors that do not fit {CONFIG}: " + "; ".join(problems))
    return config, params


def tensor_places(config: DecoderConfig) -> dict[str, tuple[str, int | None]]:
    """Hugging Face tensor name -> (our parameter path, layer or None), layers in order."""
    places = {}
    for path in config.parameter_shapes:
        if path in TOP_MODULES:
            places[f"{TOP_MODULES[path]}.weight"] = path, None
            continue
        module = LAYER_MODULES[path.removeprefix("layers/")]
        for layer in range(config.num_layers):
            places[f"model.layers.{layer}.{module}.weight"] = path, layer
    return places


def is_transposed(path: str) -> bool:
    """Whether their tensor is ours transposed: every matrix but the embedding."""
    return path.endswith("_proj") or path == "lm_head"


def _fill(params, path: str, layer: int | None, name: str, tensors) -> list[str]:
    """Copies one tensor into its place, or returns what is wrong with its shape."""
    slot = params[path] if layer is None else params[path][layer]
    wanted = slot.shape[::-1] if is_transposed(path) else slot.shape
    shape = tuple(tensors.get_slice(name).get_shape())
    if shape != wanted:
        return [f"{name} has shape {shape}, expected {wanted}"]
    values = tensors.get_tensor(name)
    slot[...] = values.T if is_transposed(path) else values
    return []


def _is_redundant(name: str, config: DecoderConfig) -> bool:
    """A tied head written twice, or the rotary tables that old checkpoints hold."""
    return (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("inv_freq")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        shards = set(_read_json(folder / INDEX).get("weight_map", {}).values())
        return [folder / shard for shard in sorted(shards)]
    return [folder / WEIGHTS]


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
