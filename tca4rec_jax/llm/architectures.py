"""Architectures of published models, so that a program can be planned and compiled without weights.

The fields are those of each model's config.json; loading reads them from the weights instead.
"""

from pathlib import Path

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling


def _llama(hidden, feed_forward, layers, heads, head_dim, *, factor, tied) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=tied,
        max_positions=131072,
        rope_scaling=RopeScaling("llama3", factor),
    )


def _qwen(
    family,
    hidden,
    feed_forward,
    layers,
    heads,
    kv_heads,
    head_dim,
    *,
    tied,
    positions,
    vocab=151936,
) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
        max_positions=positions,
        biases=("q_proj", "k_proj", "v_proj") if family == "qwen2" else (),
        qk_norm=family == "qwen3",
        family=family,
    )


ARCHITECTURES = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, factor=32.0, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, factor=32.0, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 128, factor=8.0, tied=False),
    "qwen2.5-0.5b": _qwen("qwen2", 896, 4864, 24, 14, 2, 64, tied=True, positions=32768),
    "qwen2.5-1.5b": _qwen("qwen2", 1536, 8960, 28, 12, 2, 128, tied=True, positions=131072),
    "qwen2.5-7b": _qwen(
        "qwen2", 3584, 18944, 28, 28, 4, 128, tied=False, positions=131072, vocab=152064
    ),
    "qwen3-4b": _qwen("qwen3", 2560, 9728, 36, 32, 8, 128, tied=True, positions=32768),
    # SmolLM2-135M, the quickstart's.
    "smollm2-135m": DecoderConfig(
        49152, 576, 1536, 30, 9, 3, 64, 1e5, 1e-5, tie_embeddings=True, max_positions=8192
    ),
}


def architecture(name: str) -> DecoderConfig:
    """By its name, or that of weights (a folder's or an asset's), which begins with it.

    Raises UserError with the names there are.
    """
    known = [known for known in ARCHITECTURES if Path(name).name.lower().startswith(known)]
    if not known:
        raise UserError(f"llm.architecture is {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[max(known, key=len)]
