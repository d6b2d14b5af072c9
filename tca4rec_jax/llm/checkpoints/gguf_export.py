"""Writes a decoder and its tokenizer as a GGUF file, which llama.cpp opens.

The inverse of gguf.py and of tokenizer.py; what they read back is what was written. As llama.cpp's
own converter does, vectors stay float32 whatever the dtype of the matrices is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.attention import rotary_frequencies
from tca4rec_jax.llm.checkpoints.gguf import FAMILIES, PERMUTED, ROPE_DIVISORS, gguf_paths
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.families import GEMMA
from tca4rec_jax.llm.tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, USER_DEFINED

MODEL = "model.gguf"
_OTHERWISE = "export with --format=merged and use llama.cpp's own converter"
# llama.cpp's names of the families that are written.
_ARCHITECTURES = {family: name for name, family in FAMILIES.items() if family != GEMMA}
_UNUSED = 5  # tokenizer.ggml.token_type of a row of the embedding that no text has
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}


def write_gguf(
    path: Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str,
) -> None:
    """Writes a Llama's or a Qwen's parameters (by path, any float dtype) and its tokenizer.

    dtype: of the matrices. Raises UserError for another family, a sliding window, a tokenizer other
    than a byte-level BPE that llama.cpp knows, or values that are not finite in dtype.
    """
    vocabulary = _vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, _architecture(config))
    _add_config(writer, config)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    for name, value in vocabulary.items():
        getattr(writer, f"add_{name}")(value)
    kind = gguf.GGMLQuantizationType[_FILE_TYPES[dtype].rpartition("_")[2]]
    for name, (path_, layer) in gguf_paths(config).items():
        value = np.asarray(params[path_] if layer is None else params[path_][layer], np.float32)
        value = _stored(config, path_, value)
        of_tensor = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        with np.errstate(over="ignore"):
            written = gguf.quantize(value, of_tensor)
        if not np.isfinite(gguf.dequantize(written, of_tensor)).all():
            raise UserError(f"{name} has values that are not finite as {dtype}")
        writer.add_tensor(name, written, raw_dtype=of_tensor)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        sizes = config.head_dim, config.rope_theta
        divisors = rotary_frequencies(*sizes) / rotary_frequencies(*sizes, config.rope_scaling)
        writer.add_tensor(ROPE_DIVISORS, np.asarray(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(config: DecoderConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError as `write_gguf` for architecture and tokenizer: no weight is needed."""
    _architecture(config)
    _vocabulary(tokenizer, max(config.vocab_size, len(tokenizer)))


def _architecture(config: DecoderConfig) -> str:
    """llama.cpp's name of a family. Raises UserError for what `write_gguf` can't write."""
    if config.family not in _ARCHITECTURES:
        raise UserError(f"a {config.family} can't be written as GGUF: {_OTHERWISE}")
    if config.sliding_window is not None:
        raise UserError(
            f"a {config.family} whose sliding_window is {config.sliding_window} can't be written "
            f"as GGUF: {_OTHERWISE}"
        )
    return _ARCHITECTURES[config.family]


def _add_config(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _stored(config: DecoderConfig, path: str, value: np.ndarray) -> np.ndarray:
    """A parameter as llama.cpp has it: [out, in], a Llama's rotary pairs side by side."""
    value = value if path == "embedding" else value.T
    if config.family == "llama" and path in PERMUTED:
        halves = value.reshape(-1, 2, config.head_dim // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """A tokenizer's fields, by the writer's methods; tokens that no text has fill the vocabulary.

    Raises UserError for one that llama.cpp would read otherwise.
    """
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer has no tokenizer.json: {_OTHERWISE}")
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stored["model"]
    known = {_grammar(parts): name for name, parts in PRE_TOKENIZERS.items()}
    grammar = _grammar(stored["pre_tokenizer"])
    if model["type"] != "BPE" or model.get("byte_fallback") or grammar not in known:
        raise UserError(
            "the tokenizer is not a byte-level BPE whose words are cut like those of "
            f"{', '.join(PRE_TOKENIZERS)}: {_OTHERWISE}"
        )
    added = tokenizer.added_tokens_decoder
    text_of = {index: text for text, index in model["vocab"].items()}
    text_of |= {index: str(token) for index, token in added.items()}
    kinds = [NORMAL if index in text_of else _UNUSED for index in range(vocab_size)]
    for index, token in added.items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    bos = tokenizer.bos_token_id
    fields: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": known[grammar],
        "token_list": [text_of.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        "token_types": kinds,
        "token_merges": [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        "bos_token_id": bos,
        "eos_token_id": tokenizer.eos_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "add_bos_token": bos is not None and tokenizer("")["input_ids"][:1] == [bos],
        "chat_template": tokenizer.chat_template,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _grammar(pre_tokenizer: Any) -> str:
    """How a tokenizer cuts words, comparable: what only moves offsets is left out."""
    if isinstance(pre_tokenizer, list):
        parts = [json.loads(part.__getstate__()) for part in pre_tokenizer]
    else:
        parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    parts = [{k: v for k, v in (part or {}).items() if k != "trim_offsets"} for part in parts]
    return json.dumps(parts, sort_keys=True)
