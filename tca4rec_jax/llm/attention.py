"""Grouped-query attention: causal over a sequence, and over a cache that beams share.

Axis letters: B batch, S prompt sequence, M beams, E new tokens of an edge, W suffix tokens,
N query heads, K kv heads, G query heads per kv head (N = K * G), H head dim. Keys are never
repeated for the query heads that share them; scores and softmax are float32.
"""

import jax
import jax.numpy as jnp

# Finite, so that a masked score underflows to exactly zero without inf - inf.
MASKED = -1e30


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., H/2] (float32) of the rotary angles at integer positions [...]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.einsum("...,h->...h", positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x [..., heads, H] with tables [..., H/2] (halves, not interleaved)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _grouped(q: jax.Array, num_kv_heads: int) -> jax.Array:
    """[..., N, H] -> [..., K, G, H], scaled by H**-0.5."""
    *leading, heads, head_dim = q.shape
    grouped = q.reshape(*leading, num_kv_heads, heads // num_kv_heads, head_dim)
    return grouped * head_dim**-0.5


def _scores(pattern: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(pattern, q, k, preferred_element_type=jnp.float32)


def causal_attention(
    q_BxSxNxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, *, block: int = 128
) -> jax.Array:
    """Causal attention over right-padded sequences -> [B, S, N, H].

    Queries go in blocks that read only the keys up to the block's end, which saves the upper
    triangle. Padding needs no mask: it lies after every real token.
    """
    batch, length, num_kv_heads, _ = k_BxSxKxH.shape
    q_BxSxKxGxH = _grouped(q_BxSxNxH, num_kv_heads)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        k, v = k_BxSxKxH[:, :stop], v_BxSxKxH[:, :stop]
        scores = _scores("bskgh,btkh->bkgst", q_BxSxKxGxH[:, start:stop], k)
        visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        scores = jnp.where(visible[None, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        outputs.append(jnp.einsum("bkgst,btkh->bskgh", weights, v))
    return jnp.concatenate(outputs, axis=1).reshape(q_BxSxNxH.shape)


def cached_attention(
    q_BxMxExNxH: jax.Array,
    new_kv: tuple[jax.Array, jax.Array],
    prompt_kv: tuple[jax.Array, jax.Array],
    suffix_kv: tuple[jax.Array, jax.Array],
    prompt_lengths_B: jax.Array,
    suffix_lengths_BxM: jax.Array,
) -> jax.Array:
    """Attention of E new tokens per beam over prompt, suffix and themselves -> [B, M, E, N, H].

    new_kv [B, M, E, K, H]; prompt_kv [B, S, K, H], one for all beams of a user;
    suffix_kv [B, M, W, K, H]. Prompt and suffix count up to their lengths, new tokens causally.
    """
    (k_new, v_new), (k_prompt, v_prompt), (k_suffix, v_suffix) = new_kv, prompt_kv, suffix_kv
    prompt_size, suffix_size = k_prompt.shape[1], k_suffix.shape[2]
    edge = k_new.shape[2]
    q = _grouped(q_BxMxExNxH, k_new.shape[3])
    on_prompt = jnp.arange(prompt_size)[None, :] < prompt_lengths_B[:, None]
    on_suffix = jnp.arange(suffix_size)[None, None, :] < suffix_lengths_BxM[:, :, None]
    on_new = jnp.arange(edge)[:, None] >= jnp.arange(edge)[None, :]
    scores = [
        jnp.where(
            on_prompt[:, None, None, None, None, :],
            _scores("bmekgh,bskh->bkmges", q, k_prompt),
            MASKED,
        ),
        jnp.where(
            on_suffix[:, None, :, None, None, :],
            _scores("bmekgh,bmwkh->bkmgew", q, k_suffix),
            MASKED,
        ),
        jnp.where(
            on_new[None, None, None, None], _scores("bmekgh,bmfkh->bkmgef", q, k_new), MASKED
        ),
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v_new.dtype)
    on_prompt, on_suffix, on_new = jnp.split(
        weights, [prompt_size, prompt_size + suffix_size], axis=-1
    )
    out = jnp.einsum("bkmges,bskh->bmekgh", on_prompt, v_prompt)
    out += jnp.einsum("bkmgew,bmwkh->bmekgh", on_suffix, v_suffix)
    out += jnp.einsum("bkmgef,bmfkh->bmekgh", on_new, v_new)
    return out.reshape(q_BxMxExNxH.shape)
