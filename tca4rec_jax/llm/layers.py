"""What a decoder layer is made of besides products and attention: norms, gates, vectors added."""

import functools

import jax
import jax.numpy as jnp

# The gate's activation, by the name in DecoderConfig.activation.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last axis, computed in float32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    weight = on_last_axis(offset + weight_D.astype(jnp.float32), x.ndim)
    return (x32 * scale * weight).astype(x.dtype)


def on_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    """The vector as an array of ndim axes, to be combined with such."""
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, made again in the backward pass: that saves three arrays of F."""
    return ACTIVATIONS[activation](gate) * up
