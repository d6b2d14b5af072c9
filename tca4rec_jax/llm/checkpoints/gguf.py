"""The tensors of a GGUF file of a Llama, Qwen or Gemma 3.

Quantised tensors are dequantised with NumPy, some rows at a time. A Llama GGUF stores the rows of q
and k permuted for interleaved rotary pairs; they are put back into the halves that
`attention.rotate` expects. A Gemma's has the offset of its norms added in; it is taken off.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from tca4rec_jax.errors import UserError, check_choice, reading
from tca4rec_jax.llm.attention import rotary_frequencies
from tca4rec_jax.llm.checkpoints.hugging_face import (
    Index,
    ParamPath,
    StoredModel,
    StoredTensor,
    param_paths,
)
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling
from tca4rec_jax.llm.families import GEMMA, QK_NORM, gemma_blocks

# Architectures that are this decoder, and their families; a Mistral's file says 'llama'.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": GEMMA}
# llama.cpp's constants of Gemma 3, where the metadata is silent: every sixth layer sees everything,
# the others rotate by this base; the 27B, of so many layers, scales its queries otherwise.
GEMMA_PATTERN, GEMMA_LOCAL_THETA, GEMMA_27B_LAYERS = 6, 10000.0, 62
# What a Llama's file holds with its rows permuted.
PERMUTED = ("layers/q_proj", "layers/k_proj", "layers/q_proj_bias", "layers/k_proj_bias")
# What Llama 3.1 and later divide their rotary frequencies by.
ROPE_DIVISORS = "rope_freqs.weight"
KIND = "GGUF file"
_MOST_STRINGS = 1 << 24  # of an array: no vocabulary has so many


class GGUFFile(gguf.GGUFReader):
    """The metadata (`fields`) and the mapped tensors (`tensors`) of a GGUF file."""

    def __init__(self, path: str | Path):
        """Raises UserError if it is missing, not a GGUF file, or claims more than it holds."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such GGUF file")
        with reading(path, KIND):
            super().__init__(self.path)
            self._check_places()

    def field(self, name: str, default: Any = None) -> Any:
        """The value of a metadata field. Raises UserError if it is absent and has no default."""
        if name in self.fields:
            return self.fields[name].contents()
        if default is None:
            raise UserError(f"{self.path}: metadata field {name!r} is missing")
        return default

    def _check_places(self) -> None:
        """Raises ValueError unless the tensors fill the file one after the other, with zeros up to
        the alignment: one whose type or shape is damaged would be read as other numbers."""
        end = self.data_offset
        for tensor in self.tensors:
            if (
                not 0 <= tensor.data_offset - end < self.alignment
                or self.data[end : tensor.data_offset].any()
            ):
                raise ValueError(f"{tensor.name} lies at byte {tensor.data_offset}, expected {end}")
            end = tensor.data_offset + tensor.n_bytes
        if len(self.data) - end >= self.alignment or self.data[end:].any():
            raise ValueError(f"its last tensor ends at byte {end} of {len(self.data)}")

    def _get(self, offset, dtype, count=1, override_order=None):
        """As gguf's, which returns fewer numbers where the file ends."""
        numbers = super()._get(offset, dtype, count, override_order)
        if len(numbers) < count:
            raise ValueError(f"{count} numbers at byte {offset} reach beyond its end")
        return numbers

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        """As gguf's, which takes seconds: it slices the mapped file for every word of the
        vocabulary. Here an array of strings or numbers is read in one go."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start = orig_offs + 12
        order: Literal["little", "big"] = "little" if self.byte_order == "I" else "big"
        if kind[0] == gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if kind[0] == gguf.GGUFValueType.STRING:
            data, end = self.data.data, start
            parts: list[Any] = []
            for _ in range(min(int(count[0]), _MOST_STRINGS + 1)):
                begin = end + 8
                end = begin + int.from_bytes(data[end:begin], order)
                if max(begin, end) > len(data) or len(parts) == _MOST_STRINGS:
                    raise ValueError(f"{count[0]} strings at byte {start} reach beyond its end")
                parts.append(data[begin:end])
        else:
            values = self._get(start, self.gguf_scalar_to_np[kind[0]], count[0])
            parts, end = [values], start + values.nbytes
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(kind[0])]
        return end - orig_offs, [kind, count, *parts], list(range(2, 2 + len(parts))), types


def read_config(file: GGUFFile) -> DecoderConfig:
    """The architecture in the metadata.

    Raises UserError for one that is not in FAMILIES, or computes something that is not known here.
    """
    architecture = file.field("general.architecture")
    check_choice(f"{file.path}: architecture", architecture, FAMILIES)

    def meta(name, default=None):
        return file.field(f"{architecture}.{name}", default)

    hidden, heads = meta("embedding_length"), meta("attention.head_count")
    names = {tensor.name for tensor in file.tensors}
    config = DecoderConfig(
        vocab_size=meta("vocab_size", len(file.field("tokenizer.ggml.tokens"))),
        hidden_size=hidden,
        intermediate_size=meta("feed_forward_length"),
        num_layers=meta("block_count"),
        num_heads=heads,
        num_kv_heads=meta("attention.head_count_kv", heads),
        head_dim=meta("attention.key_length", hidden // heads),
        rope_theta=meta("rope.freq_base", 10000.0),
        rms_norm_eps=meta("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in names,
        max_positions=meta("context_length"),
        qk_norm=FAMILIES[architecture] in QK_NORM,
        family=FAMILIES[architecture],
    )
    if config.family == GEMMA:
        config = dataclasses.replace(config, **_gemma_fields(file, config))
    projections = tuple(config.projection_shapes)
    with_all = gguf_paths(dataclasses.replace(config, biases=projections))
    stored = {with_all[name].path for name in names & with_all.keys()}
    biases = tuple(name for name in projections if f"layers/{name}_bias" in stored)
    return dataclasses.replace(config, biases=biases, rope_scaling=_rope_scaling(file, config))


def _gemma_fields(file: GGUFFile, config: DecoderConfig) -> dict[str, Any]:
    if file.field("gemma3.final_logit_softcapping", 0.0):
        raise UserError(f"{file.path}: gemma3.final_logit_softcapping is not supported")
    pattern = file.field("gemma3.attention.sliding_window_pattern", GEMMA_PATTERN)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern > 0 for layer in range(config.num_layers)]
    wide = config.num_layers == GEMMA_27B_LAYERS
    scalar = config.hidden_size / config.num_heads if wide else float(config.head_dim)
    return gemma_blocks(config.hidden_size, scalar) | {
        "sliding_window": file.field("gemma3.attention.sliding_window"),
        "full_layers": tuple(layer for layer, slides in enumerate(pattern) if not slides),
        "local_rope_theta": file.field("gemma3.rope.freq_base_swa", GEMMA_LOCAL_THETA),
    }


def _rope_scaling(file: GGUFFile, config: DecoderConfig) -> RopeScaling | None:
    """None, 'linear' from the metadata, or 'llama3' from the tensor of divisors."""
    prefix = f"{file.field('general.architecture')}.rope.scaling"
    kind = file.field(f"{prefix}.type", "none")
    if kind == "linear":
        return RopeScaling(kind, file.field(f"{prefix}.factor"))
    if kind != "none":
        raise UserError(f"{file.path}: rope.scaling.type is {kind!r}, known are none and linear")
    divisors = next((t.data for t in file.tensors if t.name == ROPE_DIVISORS), None)
    if divisors is None:
        return None
    # The slowest pair is divided by the whole factor; every Llama has the other three settings.
    scaling = RopeScaling("llama3", float(np.max(divisors)))
    sizes = config.head_dim, config.rope_theta
    expected = rotary_frequencies(*sizes) / rotary_frequencies(*sizes, scaling)
    if divisors.shape != expected.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise UserError(f"{file.path}: {ROPE_DIVISORS} is not the rotary scaling of Llama 3.1")
    return scaling


def open_gguf(path: str | Path) -> StoredModel:
    """A file's model; tensors are F32, F16, BF16 or of a quantised type that gguf can dequantise.

    Raises UserError as `GGUFFile` and `read_config`, and naming a tensor of another type.
    """
    file = GGUFFile(path)
    with reading(path, KIND):
        config = read_config(file)
        targets, tensors = gguf_paths(config), {}
        for tensor in file.tensors:
            if tensor.name == ROPE_DIVISORS:
                continue
            shape = tuple(int(size) for size in reversed(tensor.shape))  # listed fastest axis first
            target = targets.get(tensor.name)
            path = "" if target is None else target.path
            permuted = config.family == "llama" and path in PERMUTED
            offset = config.norm_offset if path.endswith("_norm") else 0.0
            read = partial(_read, tensor, config.head_dim if permuted else None, offset)
            tensors[tensor.name] = StoredTensor(shape, read)
        for tensor in {tensor.tensor_type: tensor for tensor in file.tensors}.values():
            try:
                gguf.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                raise UserError(f"{tensor.name}: {error}") from error
        return StoredModel(config, tensors, targets)


def _read(
    tensor: gguf.ReaderTensor, head_dim: int | None, offset: float, index: Index
) -> np.ndarray:
    """A part of a tensor in float32, less the offset; head_dim: of rows that are permuted."""
    rows, *columns = index
    data, kind = tensor.data, tensor.tensor_type
    if head_dim is None:
        data = data[rows]
    else:  # rotary pairs lie side by side: their first halves come first
        order = np.arange(len(data)).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()
        data = data[order[rows]]
    if data.ndim == 2 and len(data) % 4 == 0:
        # gguf works on 16 rows at a time; of four in one its calls are fewer.
        values = gguf.dequantize(data.reshape(len(data) // 4, -1), kind).reshape(len(data), -1)
    else:
        values = gguf.dequantize(data, kind)
    values = values[:, *columns]
    return values - np.float32(offset) if offset else values


def gguf_paths(config: DecoderConfig) -> dict[str, ParamPath]:
    """GGUF tensor name -> its parameter and layer, layers in order."""
    (architecture,) = (name for name, family in FAMILIES.items() if family == config.family)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_layers)
    paths = {}
    for name, target in param_paths(config).items():
        module, kind = name.rsplit(".", 1)
        paths[f"{names[module]}.{kind}"] = target
    return paths
