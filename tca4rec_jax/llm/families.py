"""Decoder families of Hugging Face: the fields of config.json <-> DecoderConfig.

transformers' own config classes read the fields, so that absent ones have their family's defaults
and both spellings of the rotary fields (rope_scaling, rope_parameters) are understood.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, RopeScaling

# model_type -> class in transformers. SmolLM and SmolLM2 are Llamas, Qwen2.5 is a Qwen2.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Sizes that are never left to a default.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
# Fields that change what a model computes, at the only values known here.
KNOWN_VALUES = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "quantization_config": None,
    "use_mrope": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# RopeScaling field -> that of rope_parameters, by rope_type.
ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
}


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    """The architecture that config.json describes.

    Raises:
      UserError: another architecture, or a field that is missing, malformed or at a value that is
        not supported; names the field.
    """
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"model_type {family!r}, supported are {', '.join(ARCHITECTURES)}")
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise UserError(f"field {missing[0]!r} is missing")
    try:
        config = AutoConfig.for_model(**fields)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    for name, value in KNOWN_VALUES.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{name} is {getattr(config, name)!r}, supported is {value!r}")
    theta, scaling, gemma = _rope_and_gemma(config)
    window, full_layers = _window(config)
    heads = config.num_attention_heads
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope_theta=theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_embeddings=config.tie_word_embeddings,
        max_positions=config.max_position_embeddings,
        rope_scaling=scaling,
        biases=_biases(config),
        qk_norm=family in ("qwen3", "gemma3_text"),
        sliding_window=window,
        full_layers=full_layers,
        family=family,
        **gemma,
    )


def _rope_and_gemma(config: PreTrainedConfig) -> tuple[float, RopeScaling | None, dict]:
    """(rotary base and scaling, the DecoderConfig fields that only a Gemma sets)."""
    rope = config.rope_parameters
    if config.model_type != "gemma3_text":
        return *_rope(rope), {}
    local_theta, local_scaling = _rope(rope["sliding_attention"])
    if local_scaling is not None:
        raise UserError(f"rope_type of sliding_attention is {local_scaling.kind!r}, not default")
    gemma = {
        "local_rope_theta": local_theta,
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": config.hidden_size**0.5,
        "query_pre_attn_scalar": float(config.query_pre_attn_scalar),
        "activation": "gelu_tanh",
    }
    return *_rope(rope["full_attention"]), gemma


def _rope(rope: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    kind = rope["rope_type"]
    if kind not in ROPE_FIELDS:
        raise UserError(f"rope_type is {kind!r}, supported are {', '.join(ROPE_FIELDS)}")
    known = {"rope_type", "type", "rope_theta", *ROPE_FIELDS[kind].values()}
    for name in rope.keys() - known:
        if (name, rope[name]) != ("partial_rotary_factor", 1.0):
            raise UserError(f"rope field {name} is {rope[name]!r}, supported is none")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        kind, **{ours: rope[name] for ours, name in ROPE_FIELDS[kind].items()}
    )


def _window(config: PreTrainedConfig) -> tuple[int | None, tuple[int, ...]]:
    """(sliding window, layers that see everything)."""
    layers = range(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention" for _ in layers]
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) < len(layers):
        raise UserError(
            f"layer_types is {types}, supported are full_attention and sliding_attention for each"
            f" of {len(layers)} layers"
        )
    full_layers = tuple(layer for layer in layers if types[layer] == "full_attention")
    if len(full_layers) == len(layers):
        return None, ()
    if window is None:
        raise UserError("sliding_window is missing, but layer_types has sliding_attention")
    return window, full_layers


def _biases(config: PreTrainedConfig) -> tuple[str, ...]:
    """The projections with a bias. A Qwen2 has no field for it."""
    biases = (*QKV, "o_proj") if getattr(config, "attention_bias", False) else ()
    attention = QKV if config.model_type == "qwen2" else biases
    return attention + (MLP if getattr(config, "mlp_bias", False) else ())


def config_fields(config: DecoderConfig) -> dict[str, object]:
    """The fields of config.json; `decoder_config` gives the same config back.

    Raises:
      UserError: what the config's family cannot express, by field.
    """
    rope = {"rope_type": "default"}
    if config.rope_scaling is not None:
        kind = config.rope_scaling.kind
        rope = {"rope_type": kind} | {
            name: getattr(config.rope_scaling, ours) for ours, name in ROPE_FIELDS[kind].items()
        }
    fields = {
        "architectures": [ARCHITECTURES.get(config.family)],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers 5 reads rope_parameters, older versions rope_theta and rope_scaling.
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
    }
    _write_family_fields(fields, config)
    again = decoder_config(fields)
    lost = [name for name, value in vars(config).items() if vars(again)[name] != value]
    if lost:
        raise UserError(
            f"the config.json of a {config.family!r} cannot say that "
            + ", ".join(f"{name} is {vars(config)[name]!r}" for name in lost)
        )
    return fields


def _write_family_fields(fields: dict[str, object], config: DecoderConfig) -> None:
    """Adds the fields that only some families have, and removes those that a Gemma has not."""
    if config.family == "gemma3_text":
        del fields["hidden_act"], fields["rope_theta"], fields["rope_scaling"]
        local_rope = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        rope = {"full_attention": fields["rope_parameters"], "sliding_attention": local_rope}
        fields |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": int(config.query_pre_attn_scalar or config.head_dim),
            "sliding_window": config.sliding_window,
            "layer_types": _layer_types(config),
            "rope_parameters": rope,
        }
    if config.family in ("llama", "qwen3", "gemma3_text"):
        fields["attention_bias"] = "o_proj" in config.biases
    if config.family == "llama":
        fields["mlp_bias"] = "down_proj" in config.biases
    if config.family == "mistral":
        fields["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        types = _layer_types(config)
        slides = "sliding_attention"
        fields |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "layer_types": types,
            "max_window_layers": types.index(slides) if slides in types else config.num_layers,
        }


def _layer_types(config: DecoderConfig) -> list[str]:
    return [
        "full_attention"
        if config.sliding_window is None or layer in config.full_layers
        else "sliding_attention"
        for layer in range(config.num_layers)
    ]
