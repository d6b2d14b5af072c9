"""Reads a Llama-architecture GGUF file into the decoder's parameter layout.

Quantised tensors are dequantised with NumPy. A Llama GGUF stores the rows of q and k permuted for
interleaved rotary pairs; they are put back into the halves that `attention.rotate` expects.
"""

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, DecoderOptions
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters

# GGUF name -> parameter path; layer tensors are 'blk.<layer>.<name>'.
TENSOR_NAMES = {
    "token_embd.weight": "embedding",
    "output_norm.weight": "final_norm",
    "output.weight": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm.weight": "attn_norm",
    "ffn_norm.weight": "mlp_norm",
    "attn_q.weight": "q_proj",
    "attn_k.weight": "k_proj",
    "attn_v.weight": "v_proj",
    "attn_output.weight": "o_proj",
    "ffn_gate.weight": "gate_proj",
    "ffn_up.weight": "up_proj",
    "ffn_down.weight": "down_proj",
}


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """A reader of the file. Raises ValueError if it is missing or not a GGUF file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such GGUF file")
    try:
        return gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error}); fetch it again") from error


def field(reader: gguf.GGUFReader, path: str | Path, name: str, default: object = None) -> object:
    """Value of a metadata field. Raises ValueError if it is absent and has no default."""
    entry = reader.fields.get(name)
    if entry is not None:
        return entry.contents()
    if default is None:
        raise ValueError(f"{path}: metadata field {name!r} is missing")
    return default


def read_config(reader: gguf.GGUFReader, path: str | Path) -> DecoderConfig:
    """The architecture in the metadata. Raises ValueError for another architecture than llama."""
    architecture = field(reader, path, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r}, expected 'llama'")
    hidden = field(reader, path, "llama.embedding_length")
    heads = field(reader, path, "llama.attention.head_count")
    vocabulary = len(field(reader, path, "tokenizer.ggml.tokens"))
    return DecoderConfig(
        vocab_size=field(reader, path, "llama.vocab_size", vocabulary),
        hidden_size=hidden,
        intermediate_size=field(reader, path, "llama.feed_forward_length"),
        num_layers=field(reader, path, "llama.block_count"),
        num_heads=heads,
        num_kv_heads=field(reader, path, "llama.attention.head_count_kv", heads),
        head_dim=field(reader, path, "llama.attention.key_length", hidden // heads),
        rope_theta=field(reader, path, "llama.rope.freq_base", 10000.0),
        rms_norm_eps=field(reader, path, "llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        max_positions=field(reader, path, "llama.context_length"),
    )


def load_gguf(
    path: str | Path, dtype: jnp.dtype = jnp.float32
) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """Config and host parameters (by path, layers stacked, matrices [in, out]) of a GGUF file.

    Tensors may be F32, F16, BF16 or any quantised type that gguf can dequantise.
    Raises ValueError naming every tensor that is missing, unknown or of another shape.
    """
    reader = open_gguf(path)
    config = read_config(reader, path)
    shapes = config.parameter_shapes
    params = {name: np.empty(shape, dtype) for name, shape in shapes.items()}
    expected = _expected_tensors(config)
    found, problems = set(), []
    for tensor in reader.tensors:
        target = expected.get(tensor.name)
        if target is None:
            problems.append(f"unknown tensor {tensor.name}")
            continue
        found.add(tensor.name)
        parameter, layer = target
        slot = params[parameter] if layer is None else params[parameter][layer]
        # Files hold [out, in] matrices (listed fastest axis first); ours are [in, out].
        transpose = slot.ndim == 2 and parameter != "embedding"
        shape = tuple(int(size) for size in tensor.shape)
        wanted = slot.shape if transpose else slot.shape[::-1]
        if shape != wanted:
            problems.append(f"{tensor.name} has shape {shape}, expected {wanted}")
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape[::-1])
        if parameter in ("layers/q_proj", "layers/k_proj"):
            values = unpermute_rotary(values, config.head_dim)
        slot[...] = values.T if transpose else values
    problems += [f"missing tensor {name}" for name in expected if name not in found]
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return config, params


def _expected_tensors(config: DecoderConfig) -> dict[str, tuple[str, int | None]]:
    """GGUF tensor name -> (parameter path, layer)."""
    tensors = {
        name: (path, None) for name, path in TENSOR_NAMES.items() if path in config.parameter_shapes
    }
    for layer in range(config.num_layers):
        for name, path in LAYER_TENSOR_NAMES.items():
            tensors[f"blk.{layer}.{name}"] = (f"layers/{path}", layer)
    return tensors


def unpermute_rotary(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """[heads * H, in] with rotary pairs side by side -> first halves, then second halves."""
    outputs, inputs = weight.shape
    pairs = weight.reshape(outputs // head_dim, head_dim // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(outputs, inputs)


def load_decoder(
    path: str | Path,
    *,
    lora: LoRAConfig | None = None,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
    options: DecoderOptions = DecoderOptions(),  # noqa: B008 - frozen
) -> Decoder:
    """A decoder with the file's weights, and fresh adapters drawn from `seed` if lora is given."""
    config, params = load_gguf(path, dtype)
    adapters = None if lora is None else init_adapters(config, lora, jax.random.key(seed))
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return Decoder(config, params, lora=lora, adapters=adapters, options=options)
