"""Architectures of published models, so that a program can be planned and compiled without weights.

The fields are those of each model's config.json; loading reads them from the weights instead.
"""

from pathlib import Path
from typing import Any

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "max_positions": 131072,
}  # fmt: skip
_QWEN: dict[str, Any] = {"vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN_2 = _QWEN | {"biases": ("q_proj", "k_proj", "v_proj"), "family": "qwen2"}

ARCHITECTURES = {
    "llama-3.2-1b": DecoderConfig(
        hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, head_dim=64,
        tie_embeddings=True, rope_scaling=RopeScaling("llama3", 32.0), **_LLAMA_3,
    ),
    "llama-3.2-3b": DecoderConfig(
        hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24, head_dim=128,
        tie_embeddings=True, rope_scaling=RopeScaling("llama3", 32.0), **_LLAMA_3,
    ),
    "llama-3.1-8b": DecoderConfig(
        hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, head_dim=128,
        rope_scaling=RopeScaling("llama3", 8.0), **_LLAMA_3,
    ),
    "qwen2.5-0.5b": DecoderConfig(
        hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2,
        head_dim=64, tie_embeddings=True, max_positions=32768, **_QWEN_2,
    ),
    "qwen2.5-1.5b": DecoderConfig(
        hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2,
        head_dim=128, tie_embeddings=True, max_positions=131072, **_QWEN_2,
    ),
    "qwen2.5-7b": DecoderConfig(
        hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
        head_dim=128, max_positions=131072, **_QWEN_2 | {"vocab_size": 152064},
    ),
    "qwen3-4b": DecoderConfig(
        hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32, num_kv_heads=8,
        head_dim=128, tie_embeddings=True, max_positions=32768, qk_norm=True, family="qwen3",
        **_QWEN,
    ),
    # The quickstart's.
    "smollm2-135m": DecoderConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, rope_theta=1e5, rms_norm_eps=1e-5, tie_embeddings=True,
        max_positions=8192,
    ),
}  # fmt: skip


def architecture(name: str) -> DecoderConfig:
    """By its name, or that of weights (a folder's or an asset's), which begins with it.

    Raises UserError with the names there are.
    """
    known = [known for known in ARCHITECTURES if Path(name).name.lower().startswith(known)]
    if not known:
        raise UserError(f"llm.architecture is {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[max(known, key=len)]
