"""Projections stored in 8 or 4 bits, and read back into floats where they are used.

int8: an integer in -127..127 and a scale per output. nf4 (QLoRA, arXiv 2305.14314): one of sixteen
levels, which are quantiles of a normal distribution, and a scale per output and group of GROUP
inputs; the halves of a group share its bytes. Scales are float32: 8 and 4.5 bits per weight.
Biases, norms, the embedding and the head are not quantised.

Why not qwix (0.1.8, tried): its providers want a model that holds floats. Its functions of arrays
store four bits in jnp.int4, of which XLA on CPU unpacks a scanned stack to two bytes a weight, and
look nf4's levels up one by one: for a TPU v5e, 11 bytes a weight of temporary memory.

Axis letters: L layers, I inputs, O outputs, G groups, C inputs of a group, J bytes of codes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tca4rec_jax.llm.config import GROUP, SCALES, DecoderConfig

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def quantise(kind: str, weight_IxO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of a matrix of floats; kind is a key of SCALES."""
    return _TO_CODES[kind](weight_IxO.astype(jnp.float32))


def dequantise(kind: str, codes_JxO: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The matrix [I, O] that codes and scales of a layer stand for, rounded to dtype once."""
    return _FROM_CODES[kind](jnp.asarray(codes_JxO), jnp.asarray(scale)).astype(dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def quantised_product(kind: str, x: jax.Array, codes_JxO: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., I] times the stored matrix -> [..., O].

    The matrix is dequantised again in the backward pass: saved ones would be floats of all layers.
    """
    return jnp.einsum("...i,io->...o", x, dequantise(kind, codes_JxO, scale, x.dtype))


def dequantise_params(
    config: DecoderConfig, params: dict[str, jax.Array], dtype: jnp.dtype
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """(config, parameters) with floats for codes; unchanged if the decoder is not quantised."""
    kind = config.quantised
    if not kind:
        return config, params
    floats = dataclasses.replace(config, quantised="")
    layer = functools.partial(dequantise, kind, dtype=dtype)
    projections = {
        path: jax.jit(jax.vmap(layer))(params[path], params[path + SCALES[kind]])
        for path in (f"layers/{name}" for name in config.projection_shapes)
    }
    return floats, {path: params[path] for path in floats.parameter_shapes} | projections


def _to_int8(weight_IxO):
    scale_O = _divisible(jnp.max(jnp.abs(weight_IxO), axis=0) / 127)
    return jnp.round(weight_IxO / scale_O[None, :]).astype(jnp.int8), scale_O


def _from_int8(codes_IxO, scale_O):
    return codes_IxO.astype(jnp.float32) * scale_O[None, :]


def _to_nf4(weight_IxO):
    weight_GxCxO = weight_IxO.reshape(-1, GROUP, weight_IxO.shape[1])
    scale_GxO = _divisible(jnp.max(jnp.abs(weight_GxCxO), axis=1))
    relative_GxCxO = weight_GxCxO / scale_GxO[:, None, :]
    codes_GxCxO = jnp.zeros(relative_GxCxO.shape, jnp.uint8)
    for lower, upper in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        codes_GxCxO += relative_GxCxO > (lower + upper) / 2
    low_GxJxO, high_GxJxO = jnp.split(codes_GxCxO, 2, axis=1)
    return (low_GxJxO | high_GxJxO << 4).reshape(-1, weight_IxO.shape[1]), scale_GxO


def _from_nf4(codes_JxO, scale_GxO):
    groups, outputs = scale_GxO.shape
    codes_GxJxO = codes_JxO.reshape(groups, GROUP // 2, outputs)
    codes_GxCxO = jnp.concatenate([codes_GxJxO & 15, codes_GxJxO >> 4], axis=1)
    return (_level(codes_GxCxO, LEVELS) * scale_GxO[:, None, :]).reshape(-1, outputs)


def _level(codes, levels):
    """levels[codes] without a gather, which would take longer than the product."""
    if len(levels) == 1:
        return jnp.float32(levels[0])
    half = len(levels) // 2
    upper = (codes & half).astype(bool)
    return jnp.where(upper, _level(codes, levels[half:]), _level(codes, levels[:half]))


def _divisible(scale):
    return jnp.where(scale == 0, 1, scale)


_TO_CODES = {"int8": _to_int8, "nf4": _to_nf4}
_FROM_CODES = {"int8": _from_int8, "nf4": _from_nf4}
