"""Decoder families of Hugging Face: the fields of config.json <-> DecoderConfig.

transformers' own config classes read the fields, so that absent ones have their family's defaults
and both spellings of the rotary fields (rope_scaling, rope_parameters) are understood.
"""

import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.llm.config import DecoderConfig, Layers, RopeScaling
from tca4rec_jax.ranges import check

GEMMA = "gemma3_text"
# By model_type. SmolLM and SmolLM2 are Llamas, Qwen2.5 is a Qwen2.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", GEMMA)
# Fields of config.json -> those of DecoderConfig. The first are never left to a default.
REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "rms_norm_eps",
}
FIELDS = REQUIRED | {"num_key_value_heads": "num_kv_heads", "tie_word_embeddings": "tie_embeddings"}
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
QK_NORM = ("qwen3", GEMMA)
FULL, SLIDING = "full_attention", "sliding_attention"  # layer_types
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Fields of rope_parameters, which are RopeScaling's, by rope_type.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": LLAMA3}


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    """The architecture that config.json describes.

    Raises UserError for another architecture, or naming a field that is missing, malformed or at a
    value that is not supported.
    """
    family = str(fields.get("model_type"))
    check_choice("model_type", family, FAMILIES)
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise UserError(f"field {missing[0]!r} is missing")
    # Before transformers lists the type of each.
    check("num_hidden_layers", fields["num_hidden_layers"], Layers)
    try:
        config = CONFIG_MAPPING[family](**fields)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    for name, value in KNOWN_VALUES.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{name} is {getattr(config, name)!r}, supported is {value!r}")
    return DecoderConfig(
        **{ours: getattr(config, theirs) for theirs, ours in FIELDS.items()},
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        biases=_biases(config),
        qk_norm=family in QK_NORM,
        family=family,
        **_window_fields(config),
        **(_gemma_fields(config) if family == GEMMA else _rope_fields(config.rope_parameters)),
    )


def _gemma_fields(config: PreTrainedConfig) -> dict[str, Any]:
    local = _rope_fields(config.rope_parameters[SLIDING])
    if local["rope_scaling"] is not None:
        raise UserError(f"rope_type of {SLIDING} is {local['rope_scaling'].kind!r}, not default")
    rope = _rope_fields(config.rope_parameters[FULL]) | {"local_rope_theta": local["rope_theta"]}
    return rope | gemma_blocks(config.hidden_size, float(config.query_pre_attn_scalar))


def gemma_blocks(hidden_size: int, query_pre_attn_scalar: float) -> dict[str, Any]:
    """Fields of DecoderConfig: what a layer of every Gemma 3 has that those of others lack."""
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": hidden_size**0.5,
        "query_pre_attn_scalar": query_pre_attn_scalar,
        "activation": "gelu_tanh",
    }


def _rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    check_choice("rope_type", kind, ROPE_FIELDS)
    for name in rope.keys() - {"rope_type", "type", "rope_theta", *ROPE_FIELDS[kind]}:
        if (name, rope[name]) != ("partial_rotary_factor", 1.0):
            raise UserError(f"rope field {name} is {rope[name]!r}, supported is none")
    scaling = {name: rope[name] for name in ROPE_FIELDS[kind]}
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": RopeScaling(kind, **scaling) if scaling else None,
    }


def _window_fields(config: PreTrainedConfig) -> dict[str, Any]:
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if types is None:
        types = [FULL if window is None else SLIDING] * config.num_hidden_layers
    if not set(types) <= {FULL, SLIDING}:
        raise UserError(f"layer_types is {types}, supported are {FULL} and {SLIDING}")
    if SLIDING not in types:
        return {}
    if window is None:
        raise UserError(f"sliding_window is missing, but layer_types has {SLIDING}")
    full_layers = tuple(layer for layer, kind in enumerate(types) if kind == FULL)
    return {"sliding_window": window, "full_layers": full_layers}


def _biases(config: PreTrainedConfig) -> tuple[str, ...]:
    """The projections with a bias. A Qwen2 has no field for it."""
    biases = (*QKV, "o_proj") if getattr(config, "attention_bias", False) else ()
    attention = QKV if config.model_type == "qwen2" else biases
    return attention + (MLP if getattr(config, "mlp_bias", False) else ())


def config_fields(config: DecoderConfig) -> dict[str, object]:
    """The fields of config.json; `decoder_config` gives the same config back.

    Raises UserError for what the config's family cannot express, by field.
    """
    check_choice("family", config.family, FAMILIES)
    if config.family == GEMMA and config.query_pre_attn_scalar is None:
        config = dataclasses.replace(config, query_pre_attn_scalar=float(config.head_dim))
    declared = {field.name for field in dataclasses.fields(CONFIG_MAPPING[config.family])}
    fields = {name: value for name, value in _any_family(config).items() if name in declared}
    kind = config.rope_scaling.kind if config.rope_scaling else "default"
    scaling = {name: getattr(config.rope_scaling, name) for name in ROPE_FIELDS[kind]}
    scaling["rope_type"] = kind
    rope = scaling | {"rope_theta": config.rope_theta}
    if config.family == GEMMA:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        rope = {FULL: rope, SLIDING: local}
    else:  # transformers 5 reads rope_parameters, older versions these
        fields["rope_theta"] = config.rope_theta
        fields["rope_scaling"] = scaling if config.rope_scaling else None
    fields |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.family]],
        "model_type": config.family,
        "head_dim": config.head_dim,  # a Qwen2's class does not declare it, and reads it
        "rope_parameters": rope,
    }
    again = decoder_config(fields)
    lost = [name for name, value in vars(config).items() if vars(again)[name] != value]
    if lost:
        raise UserError(
            f"the config.json of a {config.family!r} cannot say that "
            + ", ".join(f"{name} is {vars(config)[name]!r}" for name in lost)
        )
    return fields


def _any_family(config: DecoderConfig) -> dict[str, object]:
    """The fields of config.json, those included that the config's family has not."""
    window = config.sliding_window
    full_layers = range(config.num_layers) if window is None else config.full_layers
    types = [FULL if layer in full_layers else SLIDING for layer in range(config.num_layers)]
    return {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()} | {
        "hidden_act": "silu",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": "o_proj" in config.biases,
        "mlp_bias": "down_proj" in config.biases,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar or 0),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types,
        "max_window_layers": [*types, SLIDING].index(SLIDING),
    }
