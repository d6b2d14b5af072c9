"""Reads a Hugging Face folder (config.json, safetensors) into the decoder's parameter layout."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.checkpoints.loading import Index, ParamPath, StoredTensor, load_parameters
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import decoder_config

# Our parameter path, or layer parameter -> Hugging Face module.
TOP_MODULES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Of a model with post_norms, where they have the other families' names.
POST_NORM_MODULES = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
FLOATS = ("F32", "F16", "BF16")
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


def read_config(folder: str | Path) -> DecoderConfig:
    """The architecture in config.json.

    Raises:
      UserError: no such file, an architecture or a field's value that is not supported, or a field
        that is missing; names the file and the field.
    """
    path = Path(folder) / CONFIG
    fields = _read_json(path)
    try:
        return decoder_config(fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_hugging_face(
    folder: str | Path,
    dtype: jnp.dtype = jnp.float32,
    *,
    sharding: Callable[[DecoderConfig, str], Sharding] | None = None,
    quantised: str = "",
    num_layers: int = 0,
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """Config and parameters (by path, layers stacked, matrices [in, out]) of a folder.

    One file or a sharded index; float32, bfloat16 or float16. See `loading` for how little memory
    it takes, and for `sharding`, `quantised` and `num_layers`.

    Raises:
      UserError: as `read_config`, a config that cannot be quantised so, an unreadable file, or
        every tensor that is missing, unknown or of another shape or kind, by name.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        try:
            tensors |= _stored_tensors(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    tensors = {name: value for name, value in tensors.items() if not _is_redundant(name, config)}
    try:
        paths = param_paths(config)
        return load_parameters(config, tensors, paths, dtype, sharding, quantised, num_layers)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def param_paths(config: DecoderConfig) -> dict[str, ParamPath]:
    """Hugging Face tensor name -> its parameter and layer, layers in order."""
    paths = {}
    modules = LAYER_MODULES | (POST_NORM_MODULES if config.post_norms else {})
    for path in config.parameter_shapes:
        if path in TOP_MODULES:
            paths[f"{TOP_MODULES[path]}.weight"] = ParamPath(path, None)
            continue
        name = path.removeprefix("layers/")
        kind = "bias" if name.endswith("_bias") else "weight"
        module = modules[name.removesuffix("_bias")]
        for layer in range(config.num_layers):
            paths[f"model.layers.{layer}.{module}.{kind}"] = ParamPath(path, layer)
    return paths


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    stored = {}
    with safe_open(file, framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_slice(name)
            if tensor.get_dtype() not in FLOATS:
                raise UserError(
                    f"{file}: {name} is {tensor.get_dtype()}, supported are {', '.join(FLOATS)}"
                )
            stored[name] = StoredTensor(tuple(tensor.get_shape()), partial(_read, file, name))
    return stored


def _read(file: Path, name: str, index: Index) -> np.ndarray:
    # Opened for each piece: the pages that a map has read count as memory until it is closed.
    with safe_open(file, framework="np") as tensors:
        return tensors.get_slice(name)[index]


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
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
