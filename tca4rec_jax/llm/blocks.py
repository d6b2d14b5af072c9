"""One layer of the decoder: an attention block and an MLP block, each added to its input.

Axis letters: B batch rows, D width, F feed-forward width, H head dim, Qh query heads, Kv kv heads,
R adapter rank. "..." are the axes of the tokens: [B, S] whole sequences, [N] packed ones.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tca4rec_jax.llm.attention import rotate
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.lora import LoRAConfig, dropout, fold_in, lora_deltas
from tca4rec_jax.llm.quantisation import quantised_product

# The gate's activation, by the name in DecoderConfig.activation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# What remat 'products' saves for the backward pass: the rest of a layer is elementwise.
SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names("product", "low_rank", "normaliser")
_save = functools.partial(checkpoint_name, name="product")

# Rotary tables (cos, sin), float32 [..., H/2].
Rope = tuple[jax.Array, jax.Array]
# (q [..., Qh, H], k [..., Kv, H], v [..., Kv, H]) -> attended values [..., Qh, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer and the operations that use them."""

    config: DecoderConfig
    weights: dict[str, jax.Array]  # as in parameter_shapes, without 'layers/' and the layer axis
    lora: LoRAConfig | None
    # {projection: {'a': [in, R], 'b': [R, out]}}; empty in a layer without adapters.
    adapters: dict[str, dict[str, jax.Array]]
    dropout_key_B: jax.Array | None  # a key for each row; None: no dropout
    dropout: float = 0.0  # of what each block adds; adapters have their own

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """RMS norm of x over its last axis, in the dtype of x."""
        config = self.config
        return rms_norm(x, self.weights[name], config.rms_norm_eps, config.norm_offset)

    def post_norm(self, y: jax.Array, name: str) -> jax.Array:
        """The norm of a block's output [..., D], in models that have one."""
        return self.norm(_save(y), name) if self.config.post_norms else y

    def add(self, x: jax.Array, y: jax.Array, *, site: int) -> jax.Array:
        """x plus a block's output y, [..., D] each, after dropout with a mask for each `site`."""
        return x + dropout(y, self.dropout, fold_in(self.dropout_key_B, site))

    def project(self, x: jax.Array, *names: str, site: int) -> list[jax.Array]:
        """x [..., in] times each named matrix, with bias and adapter -> [..., out] each.

        The named adapters share one dropped copy of x; `site` numbers the layer's four inputs of
        projections, so that each has a dropout mask of its own.
        """
        outputs = {name: self._linear(x, name) for name in names}
        adapted = [name for name in names if name in self.adapters]
        if adapted and self.lora is not None:
            dropped_x = dropout(x, self.lora.dropout, fold_in(self.dropout_key_B, site))
            deltas = lora_deltas(dropped_x, [self.adapters[name] for name in adapted], self.lora)
            for name, delta in zip(adapted, deltas, strict=True):
                outputs[name] += delta
        return list(outputs.values())

    def _linear(self, x: jax.Array, name: str) -> jax.Array:
        weights, kind = self.weights, self.config.quantised
        if kind:
            y = quantised_product(kind, x, weights[name], weights[name + SCALES[kind]])
        elif self.lora is not None:
            # The axes of x stay apart: merged, sharded ones cost a TPU a tenth more cycles.
            y = jnp.einsum("...i,io->...o", x, weights[name])
        else:
            # Tokens on one axis: else XLA transposes the largest arrays for a matrix's gradient.
            y = jnp.dot(x.reshape(-1, x.shape[-1]), weights[name])
            y = y.reshape(*x.shape[:-1], -1)
        bias = weights.get(f"{name}_bias")
        return y if bias is None else y + _last_axis(bias, y.ndim)


def decoder_layer(
    layer: Layer,
    x: jax.Array,
    rope: Rope,
    attend: Attend,
    seen: tuple[jax.Array, Rope] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer on x [..., D] -> (its output [..., D], the rotated (k, v) [..., Kv, H]).

    `seen`: the tokens that keys and values are of, and their rope, if they are others than x's.
    """
    y, kv = attention_block(layer, x, rope, attend, seen)
    x = _save(layer.add(x, y, site=4))
    return layer.add(x, mlp_block(layer, x), site=5), kv


def attention_block(
    layer: Layer,
    x: jax.Array,
    rope: Rope,
    attend: Attend,
    seen: tuple[jax.Array, Rope] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """norm -> q, k, v -> rotation -> attention -> output projection.

    Returns ([..., D], to be added to x; the rotated (k, v), each [..., Kv, H] of `seen` or x).
    """
    config, seen_rope = layer.config, rope
    if seen is None:
        qkv = layer.project(layer.norm(x, "attn_norm"), "q_proj", "k_proj", "v_proj", site=0)
    else:
        seen_x, seen_rope = seen
        qkv = layer.project(layer.norm(x, "attn_norm"), "q_proj", site=0)
        qkv += layer.project(layer.norm(seen_x, "attn_norm"), "k_proj", "v_proj", site=0)
    q, k, v = (y.reshape(*y.shape[:-1], -1, config.head_dim) for y in qkv)
    if config.qk_norm:
        q, k = layer.norm(_save(q), "q_norm"), layer.norm(_save(k), "k_norm")
    if config.query_pre_attn_scalar is not None:
        q *= (config.head_dim / config.query_pre_attn_scalar) ** 0.5
    q, k, v = _save(rotate(q, *rope)), _save(rotate(k, *seen_rope)), _save(v)
    attended = _save(attend(q, k, v))
    (y,) = layer.project(attended.reshape(*x.shape[:-1], -1), "o_proj", site=1)
    return layer.post_norm(y, "attn_post_norm"), (k, v)


def mlp_block(layer: Layer, x: jax.Array) -> jax.Array:
    """norm -> activation(gate) * up -> down: [..., D], to be added to x [..., D]."""
    gate, up = layer.project(layer.norm(x, "mlp_norm"), "gate_proj", "up_proj", site=2)
    hidden = gated_activation(layer.config.activation, _save(gate), _save(up))
    (y,) = layer.project(hidden, "down_proj", site=3)
    return layer.post_norm(y, "mlp_post_norm")


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated_activation(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, [..., F] each; recomputed in the backward pass, which saves three
    arrays of that shape."""
    return ACTIVATIONS[activation](gate) * up


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last axis, computed in float32, in the dtype of x."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = _last_axis(offset + weight_D.astype(jnp.float32), x.ndim)
    return (x32 * scale * weight).astype(x.dtype)


def _last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """The vector as the last of `ndim` axes, to be broadcast over the others."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))
