"""Writes PEFT adapters and checkpoints that `transformers` opens; reads PEFT adapters.

Our matrices are [in, out] and stacked over layers; theirs are [out, in], one tensor per layer.
Every folder is written atomically: it is there as a whole or not at all.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path
from tca4rec_jax.llm.checkpoints.hugging_face import LAYER_MODULES, param_paths
from tca4rec_jax.llm.checkpoints.loading import is_transposed
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, check_adapters, check_shapes
from tca4rec_jax.llm.families import config_fields
from tca4rec_jax.llm.lora import Adapters, LoRAConfig, merge_adapters
from tca4rec_jax.llm.quantisation import dequantise_params

DTYPES = ("float32", "bfloat16", "float16")
# What can be exported -> how to load it.
LOADING = {
    "peft": "peft.PeftModel.from_pretrained(base, {folder!r}), base as --format=base writes it",
    "merged": "transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    "base": "transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
}

ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT's LoraConfig that change what an adapter computes, at the only values known here.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def export_decoder(
    folder: str | Path,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str,
    dtype: str,
    base_model: str,
) -> str:
    """Writes a trained decoder; returns one line on how to load it.

    Quantised weights are written as the floats that they stand for.

    Args:
      kind: 'peft' (the adapters), 'merged' (one model, adapters included) or 'base' (the model that
        the adapters were trained on).
      dtype: of the tensors of 'merged' and 'base'; one of DTYPES. Adapters are float32.
      base_model: name of the base model, kept in the adapters' config.

    Raises:
      ValueError: another kind or dtype, a kind other than 'merged' for a decoder without adapters,
        and as `write_peft_adapter` and `write_hugging_face`.
    """
    _check_one_of("kind", kind, LOADING)
    _check_one_of("dtype", dtype, DTYPES)
    params, adapters = decoder.arrays()
    if kind != "merged" and decoder.lora is None:
        raise UserError(f"every weight was trained, without adapters: give 'merged', not {kind!r}")
    if kind == "peft" and decoder.lora is not None:
        write_peft_adapter(folder, decoder.config, decoder.lora, adapters, base_model=base_model)
    else:
        # In the wider dtype, so that a weight is rounded once.
        wider = jnp.promote_types(decoder.embedding.dtype, dtype)
        config, params = dequantise_params(decoder.config, params, wider)
        if kind == "merged":
            params = {path: value.astype(wider) for path, value in params.items()}
            if decoder.lora is not None:
                params = merge_adapters(params, adapters, decoder.lora)
        write_hugging_face(folder, config, params, tokenizer, dtype=dtype)
    return LOADING[kind].format(folder=str(folder))


def write_hugging_face(
    folder: str | Path,
    config: DecoderConfig,
    params: dict[str, jax.Array],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
) -> None:
    """Writes config.json, model.safetensors and the tokenizer for `AutoModelForCausalLM`.

    Args:
      folder: new or empty.
      params: by path, shapes as in `config.parameter_shapes`, any float dtype.
      dtype: of the written tensors, one of DTYPES.

    Raises:
      ValueError: a folder that holds something, parameters that do not fit the config, a dtype
        that cannot hold their values, or a config that its family's config.json cannot express.
    """
    check_shapes("parameters", params, config.parameter_shapes)
    fields = _checkpoint_config(config, tokenizer, dtype)
    with _new_folder(folder) as new:
        _write_json(new / "config.json", fields)
        _write_tensors(new / "model.safetensors", _model_tensors(config, params), dtype)
        tokenizer.save_pretrained(new)


def _checkpoint_config(
    config: DecoderConfig, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> dict[str, object]:
    _check_one_of("dtype", dtype, DTYPES)
    return config_fields(config) | {
        "dtype": dtype,  # transformers 5; older versions read torch_dtype
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write_peft_adapter(
    folder: str | Path,
    config: DecoderConfig,
    lora: LoRAConfig,
    adapters: Adapters,
    *,
    base_model: str,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (float32), as PEFT lays them out.

    PEFT then has adapters in the layers from `lora.first_layer` on, and only there.

    Args:
      folder: new or empty.
      adapters: {projection: {'a': [L, in, R], 'b': [L, R, out]}}.
      base_model: what PEFT's `base_model_name_or_path` says.

    Raises:
      ValueError: a folder that holds something, or adapters of other projections or shapes
        than `lora` gives them.
    """
    check_adapters(config, lora, adapters)
    layers = range(lora.first_layer, config.num_layers)
    tensors = {
        name: np.asarray(adapters[projection][part][layer]).T
        for name, (projection, part, layer) in _adapter_targets(adapters, layers).items()
    }
    fields = PLAIN_LORA | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(adapters),
        "layers_to_transform": list(layers) if lora.first_layer else None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with _new_folder(folder) as new:
        _write_json(new / ADAPTER_CONFIG, fields)
        _write_tensors(new / ADAPTER_TENSORS, tensors, "float32")


def read_peft_adapter(folder: str | Path) -> tuple[LoRAConfig, Adapters]:
    """The settings and the adapters (float32) in a folder that PEFT or `write_peft_adapter` wrote.

    `targets` names the projections one by one: a regular expression is not kept in the file.
    Adapters below `first_layer` are not in the file either, and zero.

    Raises:
      ValueError: a missing or unreadable file, settings that are not plain LoRA or leave out layers
        other than the lowest, or a tensor that is missing, unexpected or of another shape; each
        with the file's name.
    """
    folder = Path(folder)
    lora = _read_adapter_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_TENSORS
    tensors = _read_tensors(path)
    numbers = [int(found) for name in tensors for found in re.findall(r"\.layers\.(\d+)\.", name)]
    layers = range(lora.first_layer, max(numbers, default=lora.first_layer) + 1)
    targets = _adapter_targets(lora.targets.split("|"), layers)
    problems = [f"missing tensor {name}" for name in targets if name not in tensors]
    problems += [f"unexpected tensor {name}" for name in tensors if name not in targets]
    problems += _misshapen(tensors, targets, lora.rank)
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    stacks: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, (projection, part, _) in targets.items():
        stack = stacks.setdefault(projection, {}).setdefault(part, [])
        stack.append(tensors[name].T.astype(np.float32))
    below = ((lora.first_layer, 0), (0, 0), (0, 0))
    return lora, {
        projection: {
            part: jnp.asarray(np.pad(np.stack(stack), below)) for part, stack in parts.items()
        }
        for projection, parts in stacks.items()
    }


def _misshapen(
    tensors: dict[str, np.ndarray], targets: dict[str, tuple[str, str, int]], rank: int
) -> list[str]:
    """What is wrong with the shapes: the rank is known, the first layer gives the other sizes."""
    problems = []
    first: dict[tuple[str, str], tuple[int, ...]] = {}
    for name in filter(tensors.__contains__, targets):
        shape = tensors[name].shape
        projection, part, _ = targets[name]
        like = first.setdefault((projection, part), shape or (0,))
        expected = (rank, like[-1]) if part == "a" else (like[0], rank)
        if shape != expected:
            problems.append(f"{name} has shape {shape}, expected {expected}")
    return problems


def check_vacant(folder: str | Path) -> None:
    """Raises ValueError if something other than an empty folder is at `folder`."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another or delete it")


def _check_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@contextlib.contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which is at `folder` when the block ends without an error."""
    check_vacant(folder)
    with atomic_path(Path(folder).resolve()) as temporary:
        temporary.mkdir()
        yield temporary


def _model_tensors(config: DecoderConfig, params: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Hugging Face name -> tensor; a tied head is not repeated."""
    tensors = {}
    for name, (path, layer) in param_paths(config).items():
        value = np.asarray(params[path] if layer is None else params[path][layer])
        tensors[name] = value.T if is_transposed(path) else value
    return tensors


def _adapter_targets(
    projections: Iterable[str], layers: Iterable[int]
) -> dict[str, tuple[str, str, int]]:
    """PEFT tensor name -> (projection, 'a' or 'b', layer), layers in order."""
    name = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    return {
        name.format(layer, LAYER_MODULES[projection], letter): (projection, part, layer)
        for projection in projections
        for part, letter in (("a", "A"), ("b", "B"))
        for layer in layers
    }


def _read_adapter_config(path: Path) -> LoRAConfig:
    """Plain LoRA settings. Raises ValueError with the file's name for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        fields = json.loads(path.read_text("utf-8"))
        changed = {k: fields[k] for k, plain in PLAIN_LORA.items() if fields.get(k, plain) != plain}
        if changed:
            raise UserError(f"only plain LoRA can be read, but {changed}")
        targets = fields["target_modules"]
        known = [name for name in LAYER_MODULES if name.endswith("_proj")]
        if not isinstance(targets, list) or not targets or not set(targets) <= set(known):
            raise UserError(f"target_modules is {targets!r}, expected a list of {known}")
        return LoRAConfig(
            rank=fields["r"],
            alpha=float(fields["lora_alpha"]),
            dropout=fields.get("lora_dropout", 0.0),
            targets="|".join(name for name in known if name in targets),
            first_layer=_first_layer(fields.get("layers_to_transform")),
        )
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def _first_layer(layers: list[int] | int | None) -> int:
    """The lowest of PEFT's layers_to_transform (none: all layers), which must be consecutive.

    Whether the last one is the model's is not in the file; Decoder checks it.
    """
    layers = [layers] if isinstance(layers, int) else sorted(layers or [0])
    if layers != list(range(layers[0], layers[-1] + 1)):
        raise UserError(f"layers_to_transform is {layers}, expected all from some layer on")
    return layers[0]


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _write_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Raises ValueError naming a tensor with values that are not finite in dtype."""
    written = {}
    with np.errstate(over="ignore"):
        for name, value in tensors.items():
            # safetensors writes memory as it lies: a transposed view must be copied.
            written[name] = np.ascontiguousarray(value, dtype=jnp.dtype(dtype))
            if not np.isfinite(written[name]).all():
                raise UserError(f"{name} has values that are not finite as {dtype}")
    save_file(written, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file makes it private


def _write_json(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
