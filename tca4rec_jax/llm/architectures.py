"""Architectures of published models, so that a program can be planned and compiled without weights.

The fields are those of each model's config.json; loading reads them from the weights instead.
"""

from pathlib import Path
from typing import Any

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling
from tca4rec_jax.llm.families import GEMMA, gemma_blocks

_LLAMA_3: dict[str, Any] = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_positions": 131072}
_QWEN: dict[str, Any] = {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
_QWEN_2 = _QWEN | {"biases": ("q_proj", "k_proj", "v_proj"), "family": "qwen2"}
_TIED: dict[str, Any] = {"tie_embeddings": True}

# Sizes: vocabulary, hidden, intermediate, layers, heads, key-value heads, of a head.
ARCHITECTURES = {
    "llama-3.2-1b": DecoderConfig(
        128256, 2048, 8192, 16, 32, 8, 64,
        rope_scaling=RopeScaling("llama3", 32.0), **_TIED, **_LLAMA_3,
    ),
    "llama-3.2-3b": DecoderConfig(
        128256, 3072, 8192, 28, 24, 8, 128,
        rope_scaling=RopeScaling("llama3", 32.0), **_TIED, **_LLAMA_3,
    ),
    "llama-3.1-8b": DecoderConfig(
        128256, 4096, 14336, 32, 32, 8, 128, rope_scaling=RopeScaling("llama3", 8.0), **_LLAMA_3,
    ),
    "qwen2.5-0.5b": DecoderConfig(
        151936, 896, 4864, 24, 14, 2, 64, max_positions=32768, **_TIED, **_QWEN_2,
    ),
    "qwen2.5-1.5b": DecoderConfig(
        151936, 1536, 8960, 28, 12, 2, 128, max_positions=131072, **_TIED, **_QWEN_2,
    ),
    "qwen2.5-7b": DecoderConfig(
        152064, 3584, 18944, 28, 28, 4, 128, max_positions=131072, **_QWEN_2,
    ),
    "qwen3-1.7b": DecoderConfig(
        151936, 2048, 6144, 28, 16, 8, 128,
        max_positions=32768, qk_norm=True, family="qwen3", **_TIED, **_QWEN,
    ),
    "qwen3-4b": DecoderConfig(
        151936, 2560, 9728, 36, 32, 8, 128,
        max_positions=32768, qk_norm=True, family="qwen3", **_TIED, **_QWEN,
    ),
    "gemma-3-270m": DecoderConfig(
        262144, 640, 2048, 18, 4, 1, 256, rope_theta=1e6, local_rope_theta=1e4, rms_norm_eps=1e-6,
        max_positions=32768, sliding_window=512, full_layers=(5, 11, 17), qk_norm=True,
        family=GEMMA, **_TIED, **gemma_blocks(640, 256.0),
    ),
    # The quickstart's.
    "smollm2-135m": DecoderConfig(
        49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, max_positions=8192, **_TIED,
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
