"""Writes PEFT adapters and checkpoints that `transformers` opens, or GGUF; reads PEFT adapters.

Our matrices are [in, out] and stacked over layers; theirs are [out, in], one tensor per layer.
Every folder, new or empty, is written atomically: it is there as a whole or not at all.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.errors import UserError, check_choice, reading
from tca4rec_jax.fileio import atomic_path, read_json
from tca4rec_jax.llm.checkpoints.gguf_export import MODEL, write_gguf
from tca4rec_jax.llm.checkpoints.hugging_face import (
    CONFIG,
    WEIGHTS,
    is_transposed,
    param_paths,
    stored_tensors,
)
from tca4rec_jax.llm.checkpoints.projector_file import write_projector
from tca4rec_jax.llm.config import DecoderConfig, check_shapes
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.families import config_fields
from tca4rec_jax.llm.lora import (
    Adapters,
    LoRAConfig,
    adapter_shapes,
    check_adapters,
    merge_adapters,
)
from tca4rec_jax.llm.quantisation import dequantise_params

DTYPES = ("float32", "bfloat16", "float16")
# What can be exported -> how to load it.
LOADING = {
    "peft": "peft.PeftModel.from_pretrained(base, {folder!r}), base as --format=base writes it",
    "merged": "transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    "base": "transformers.AutoModelForCausalLM.from_pretrained({folder!r})",
    "gguf": f"llama-completion --model={{folder}}/{MODEL}",
}
WHOLE = ("merged", "gguf")  # adapters included

TOKENIZER_CONFIG = "tokenizer_config.json"
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


def check_kind(kind: str, *, adapters: bool, new_rows: bool) -> None:
    """Raises UserError for a kind that is none, or one not WHOLE of a decoder without adapters or
    with new rows."""
    check_choice("kind", kind, LOADING)
    if kind not in WHOLE and not adapters:
        raise UserError(f"every weight was trained, without adapters: give 'merged', not {kind!r}")
    if kind not in WHOLE and new_rows:
        raise UserError(
            "the LLM has new tokens, whose rows adapters for serving cannot hold: give 'merged', "
            f"not {kind!r}"
        )


def export_decoder(
    folder: str | Path,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str,
    dtype: str,
    base_model: str | None,
    vectors: Mapping[str, object] | None = None,
    beside: Callable[[Path], object] = lambda folder: None,
) -> str:
    """Writes a trained decoder; returns one line on how to load it.

    Quantised weights are written as the floats that they stand for. A projector is written beside
    what it was trained with.

    Args:
      kind: 'peft' (the adapters), 'merged' (one model, adapters included), 'gguf' (the same for
        llama.cpp) or 'base' (the model that the adapters were trained on).
      dtype: of the tensors of all but 'peft'; one of DTYPES. Adapters are float32.
      base_model: the base model's name on the Hub or its folder, for the adapters' config; None if
        it has none that PEFT could load.
      vectors: of a decoder with a projector, what `write_projector` says of them.
      beside: writes further files into the folder.

    Raises UserError for another dtype, and as `check_kind`, `write_peft_adapter`,
    `write_hugging_face` and `write_gguf`.
    """
    check_choice("dtype", dtype, DTYPES)
    lora = decoder.lora
    check_kind(kind, adapters=lora is not None, new_rows=decoder.new_rows is not None)
    with _new_folder(folder) as new:
        if kind == "peft" and lora is not None:
            adapters = decoder.arrays()[1]
            write_peft_adapter(new, decoder.config, lora, adapters, base_model=base_model)
        else:
            config, params = _one_model(decoder, dtype, with_adapters=kind in WHOLE)
            if kind == "gguf":
                write_gguf(new / MODEL, config, params, tokenizer, dtype=dtype)
            else:
                write_hugging_face(new, config, params, tokenizer, dtype=dtype)
        if decoder.projector is not None and kind != "base":
            write_projector(new, decoder.projector, vectors or {})
        beside(new)
    return LOADING[kind].format(folder=str(folder))


def _one_model(
    decoder: Decoder, dtype: str, *, with_adapters: bool
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """The architecture and parameters of a decoder in one piece, its new rows among the others.

    In the wider of the decoder's dtype and `dtype`, so that a weight is rounded once.
    """
    params, adapters = decoder.arrays()
    wider = jnp.promote_types(decoder.embedding.dtype, dtype)
    config, params = dequantise_params(decoder.config, params, wider)
    if with_adapters and decoder.lora is not None:
        params = {path: value.astype(wider) for path, value in params.items()}
        params = merge_adapters(params, adapters, decoder.lora)
    if decoder.new_rows is not None:
        params = decoder.new_rows.merge(params)
        config = dataclasses.replace(config, vocab_size=params["embedding"].shape[0])
    return config, params


def write_hugging_face(
    folder: str | Path,
    config: DecoderConfig,
    params: dict[str, jax.Array],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
) -> None:
    """Writes config.json, model.safetensors and the tokenizer for `AutoModelForCausalLM`.

    params: by path, shapes as in `config.parameter_shapes`, any float dtype; a tied head is not
    repeated. dtype: of the written tensors, one of DTYPES.

    Raises UserError for a folder that holds something, parameters that do not fit the config, a
    dtype that cannot hold their values, or a config that its family's config.json cannot express.
    """
    check_shapes("parameters", params, config.parameter_shapes)
    check_choice("dtype", dtype, DTYPES)
    fields = config_fields(config) | {
        "dtype": dtype,  # transformers 5; older versions read torch_dtype
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tensors = {}
    for name, (path, layer) in param_paths(config).items():
        value = np.asarray(params[path] if layer is None else params[path][layer])
        tensors[name] = value.T if is_transposed(path) else value
    with _new_folder(folder) as new:
        _write(new / CONFIG, fields, new / WEIGHTS, tensors, dtype)
        tokenizer.save_pretrained(new)
        _let_transformers_4_open(new / TOKENIZER_CONFIG)


def write_peft_adapter(
    folder: str | Path,
    config: DecoderConfig,
    lora: LoRAConfig,
    adapters: Adapters,
    *,
    base_model: str | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (float32), as PEFT lays them out.

    PEFT then has adapters in the layers from `lora.first_layer` on, and only there. base_model:
    PEFT's `base_model_name_or_path`.

    Raises UserError for a folder that holds something, or adapters of other projections or shapes
    than `lora` gives them.
    """
    check_adapters(config, lora, adapters)
    tensors = {
        name: np.asarray(adapters[projection][part][layer]).T
        for name, (projection, part, layer) in _adapter_targets(config, lora).items()
    }
    layers = list(range(lora.first_layer, config.num_layers))
    fields = PLAIN_LORA | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(adapters),
        "layers_to_transform": layers if lora.first_layer else None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    with _new_folder(folder) as new:
        _write(new / ADAPTER_CONFIG, fields, new / ADAPTER_TENSORS, tensors, "float32")


def read_peft_adapter(folder: str | Path, config: DecoderConfig) -> tuple[LoRAConfig, Adapters]:
    """The settings and the adapters (float32) in a folder that PEFT or `write_peft_adapter` wrote.

    `targets` names the projections one by one: a regular expression is not kept in the file.
    Adapters below `first_layer` are not in the file either, and zero.

    Raises UserError with the file's name: a missing or unreadable file, settings that are not plain
    LoRA or leave out layers other than the lowest, or tensors that do not fit the base model.
    """
    path = Path(folder) / ADAPTER_CONFIG
    fields = read_json(path)
    with reading(path, "config of an adapter"):
        lora = _lora_config(fields, config)
        shapes = adapter_shapes(config, lora)
    path = path.with_name(ADAPTER_TENSORS)
    tensors, targets = stored_tensors(path), _adapter_targets(config, lora)
    expected = {n: shapes[name][part][:0:-1] for n, (name, part, _) in targets.items()}
    check_shapes(f"{path}: tensors", tensors, expected)
    adapters = {
        projection: {part: np.zeros(shape, np.float32) for part, shape in parts.items()}
        for projection, parts in shapes.items()
    }
    for name, (projection, part, layer) in targets.items():
        adapters[projection][part][layer] = tensors[name].read((slice(None), slice(None))).T
    return lora, jax.tree.map(jnp.asarray, adapters)


def _let_transformers_4_open(path: Path) -> None:
    """Renames what transformers 5 writes of a tokenizer that belongs to no model."""
    fields = read_json(path)
    if fields["tokenizer_class"] == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in fields:
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vacant(folder: str | Path) -> None:
    """Raises UserError if something other than an empty folder is at `folder`."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another or delete it")


@contextlib.contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which is at `folder` when the block ends without an error."""
    check_vacant(folder)
    with atomic_path(Path(folder).resolve()) as temporary:
        temporary.mkdir()
        yield temporary


def _adapter_targets(config: DecoderConfig, lora: LoRAConfig) -> dict[str, tuple[str, str, int]]:
    """PEFT tensor name -> (projection, 'a' or 'b', layer)."""
    targets, adapted = {}, adapter_shapes(config, lora)
    for name, (path, layer) in param_paths(config).items():
        module, projection = name.removesuffix(".weight"), path.removeprefix("layers/")
        if projection in adapted and layer is not None and layer >= lora.first_layer:
            for part in "ab":
                tensor = f"base_model.model.{module}.lora_{part.upper()}.weight"
                targets[tensor] = projection, part, layer
    return targets


def _lora_config(fields: dict[str, Any], config: DecoderConfig) -> LoRAConfig:
    """Plain LoRA settings. Raises an error that names the field for anything else."""
    changed = {k: fields[k] for k, plain in PLAIN_LORA.items() if fields.get(k, plain) != plain}
    if changed:
        raise UserError(f"only plain LoRA can be read, but {changed}")
    missing = [name for name in ("target_modules", "r", "lora_alpha") if name not in fields]
    if missing:
        raise UserError(f"field {missing[0]!r} is missing")
    targets, known = fields["target_modules"], list(config.projection_shapes)
    if not isinstance(targets, list) or not targets or not set(targets) <= set(known):
        raise UserError(f"target_modules is {targets!r}, expected a list of {known}")
    layers = fields.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else sorted(layers or range(config.num_layers))
    if layers[0] < 0 or layers != list(range(layers[0], config.num_layers)):
        raise UserError(f"layers_to_transform is {layers}, expected all from some layer on")
    return LoRAConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        dropout=fields.get("lora_dropout", 0.0),
        targets="|".join(name for name in known if name in targets),
        first_layer=layers[0],
    )


def _write(
    config: Path, fields: dict[str, Any], weights: Path, tensors: dict[str, np.ndarray], dtype: str
) -> None:
    """Raises UserError naming a tensor with values that are not finite in dtype."""
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    written = {}
    with np.errstate(over="ignore"):
        for name, value in tensors.items():
            # safetensors writes memory as it lies: a transposed view must be copied.
            written[name] = np.ascontiguousarray(value, dtype=jnp.dtype(dtype))
            if not np.isfinite(written[name]).all():
                raise UserError(f"{name} has values that are not finite as {dtype}")
    save_file(written, weights, metadata={"format": "pt"})
    shutil.copymode(config, weights)  # save_file makes it private, whatever the umask is
