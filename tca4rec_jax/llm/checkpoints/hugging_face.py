"""The names of Hugging Face's tensors, and the tensors of a folder (config.json, safetensors)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.fileio import read_json
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import decoder_config

# Our parameter path, or layer parameter -> Hugging Face module.
TOP_MODULES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{n: f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{n: f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")},
}
# Of a model with post_norms, where they have the other families' names.
POST_NORM_MODULES = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
FLOATS = ("F32", "F16", "BF16")
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
Index = tuple[slice, ...]


class StoredTensor(NamedTuple):
    """A tensor that has not been read: its shape and a function that reads a part of it."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


class ParamPath(NamedTuple):
    """Where a tensor goes: the decoder's parameter, and its layer; None if it has none."""

    path: str
    layer: int | None

    def tensor_shape(self, config: DecoderConfig) -> tuple[int, ...]:
        """The tensor's shape in its file."""
        shape = config.parameter_shapes[self.path][self.layer is not None :]
        return shape[::-1] if is_transposed(self.path) else shape


class StoredModel(NamedTuple):
    """A checkpoint that has not been read."""

    config: DecoderConfig
    tensors: dict[str, StoredTensor]  # by the names in its files
    targets: dict[str, ParamPath]  # the same names, for all parameters, layers in order


def is_transposed(path: str) -> bool:
    """Whether a file holds the parameter transposed: it does for every matrix but the embedding."""
    return path.endswith("_proj") or path == "lm_head"


def read_config(folder: str | Path) -> DecoderConfig:
    """The architecture in config.json.

    Raises:
      UserError: no such file, an architecture or a field's value that is not supported, or a field
        that is missing; names the file and the field.
    """
    path = Path(folder) / CONFIG
    fields = read_json(path)
    with reading(path, "config of a decoder"):
        return decoder_config(fields)


def open_folder(folder: str | Path) -> StoredModel:
    """A folder's model: one file or a sharded index; float32, bfloat16 or float16.

    Raises UserError as `read_config`, `stored_tensors`, and for an index that leaves the folder.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder) if (folder / INDEX).is_file() else [folder / WEIGHTS]:
        tensors |= stored_tensors(file)
    # A tied head written twice, or the rotary tables that old checkpoints hold.
    redundant = [name for name in tensors if name.endswith("inv_freq")]
    redundant += ["lm_head.weight"] if config.tie_embeddings else []
    for name in redundant:
        tensors.pop(name, None)
    return StoredModel(config, tensors, param_paths(config))


def _shards(folder: Path) -> list[Path]:
    """The files that an index names: in its folder, or where a cache of the Hub links to."""
    index, root = folder / INDEX, folder.resolve()
    roots = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    with reading(index, "index of safetensors files"):
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            real = (folder / name).resolve()
            if Path(name).name != name or real.parent not in roots:
                raise UserError(
                    f"{name!r} leads to {real}: expected a file in {root}, copy it there"
                )
        return [folder / name for name in names]


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


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises UserError for an unreadable file, and naming a tensor that is not one of FLOATS.
    """
    stored = {}
    with reading(file, "safetensors file"), safe_open(file, framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            tensor = tensors.get_slice(name)
            if (dtype := tensor.get_dtype()) not in FLOATS:
                raise UserError(f"{name} is {dtype}, supported are {', '.join(FLOATS)}")
            stored[name] = StoredTensor(tuple(tensor.get_shape()), partial(_read, file, name))
    return stored


def _read(file: Path, name: str, index: Index) -> np.ndarray:
    # Opened for each piece: the pages that a map has read count as memory until it is closed.
    with safe_open(file, framework="np") as tensors:
        return tensors.get_slice(name)[index]
