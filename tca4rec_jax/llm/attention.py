"""Grouped-query attention: causal over a sequence, and over a cache that beams share.

With a sliding window a token sees itself and the `window - 1` tokens before it.

Axis letters: B batch rows, S sequence, A some of its positions, Q queries, T the keys they see, Qh
query heads, Kv kv heads, G query heads per kv head (Qh = Kv * G), H head dim; of a user's beams
(kv_cache.py) M beams, Tu new tokens, Sl slots of the pool. Keys are never repeated for the query
heads that share them; scores and softmax are float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import RopeScaling
from tca4rec_jax.llm.kv_cache import BeamPaths, Packing

# Finite, so that a masked score underflows to exactly zero without inf - inf.
MASKED = -1e30


def check_implementation(name: str, platform: str, dtype: str) -> None:
    """Raises UserError if llm.attention `name` can't train in this dtype on this jax platform."""
    if name == "cudnn" and (platform != "gpu" or dtype not in ("bfloat16", "float16")):
        raise UserError(
            "llm.attention is 'cudnn', which needs an NVIDIA GPU and llm.dtype bfloat16 or float16,"
            f" not {platform} and {dtype}: use 'xla'"
        )
    if name == "splash" and platform != "tpu":
        raise UserError(f"llm.attention is 'splash', which needs a TPU, not {platform}: use 'xla'")


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position [H/2] (float32) of each pair of a head's halves."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        kept: float | np.ndarray = 0.0  # the share of a frequency that is not divided
        if scaling.kind == "llama3":
            turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., H/2] (float32) of the rotary angles at integer positions [...]."""
    frequencies = jnp.asarray(rotary_frequencies(head_dim, theta, scaling))
    frequencies = jnp.expand_dims(frequencies, tuple(range(positions.ndim)))
    # Elementwise: a dot rounds its inputs to bfloat16 on a TPU, which makes position 257 256.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x [..., heads, H] with tables [..., H/2] (halves, not interleaved)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# One transpose of q, k, v and the output, so that no product needs one of the much larger scores.
def _heads_first(q_BxSxQhxH: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, S, Qh, H] -> [B, Kv, G, S, H], scaled by H**-0.5."""
    *leading, heads, head_dim = q_BxSxQhxH.shape
    grouped = q_BxSxQhxH.reshape(*leading, num_kv_heads, heads // num_kv_heads, head_dim)
    return (grouped * head_dim**-0.5).transpose(0, 2, 3, 1, 4)


def _heads_last(out_BxKvxGxSxH: jax.Array) -> jax.Array:
    """[B, Kv, G, S, H] -> [B, S, Qh, H]."""
    batch, _, _, length, head_dim = out_BxKvxGxSxH.shape
    return out_BxKvxGxSxH.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


def _product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum accumulated and returned in float32."""
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def causal_attention(
    q_BxSxQhxH: jax.Array,
    k_BxSxKvxH: jax.Array,
    v_BxSxKvxH: jax.Array,
    *,
    window: int | jax.Array | None = None,
    implementation: str = "xla",
    block: int = 128,
) -> jax.Array:
    """Causal attention over right-padded sequences -> [B, S, Qh, H].

    window: None for no limit; traced (layers that differ in it) only for 'xla'. implementation: one
    llm.attention: 'cudnn' and 'splash' are fused kernels (see `check_implementation`).

    Queries run in blocks. A block reads the keys up to its own end, which saves the upper triangle,
    and from its window on, if that is an int. Padding needs no mask: it comes after every real
    token.
    """
    if implementation != "xla":
        if isinstance(window, jax.Array):
            raise ValueError(f"a traced window needs attention 'xla', not {implementation!r}")
        qkv = q_BxSxQhxH, k_BxSxKvxH, v_BxSxKvxH
        if implementation == "splash":
            return splash_attention(*qkv, window=window)
        before = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            *qkv, is_causal=True, local_window_size=before, implementation="cudnn"
        )
    length, num_kv_heads = k_BxSxKvxH.shape[1:3]
    q_BxKvxGxSxH = _heads_first(q_BxSxQhxH, num_kv_heads)
    k_BxKvxSxH, v_BxKvxSxH = k_BxSxKvxH.swapaxes(1, 2), v_BxSxKvxH.swapaxes(1, 2)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        q = q_BxKvxGxSxH[:, :, :, start:stop]
        k, v = k_BxKvxSxH[:, :, first:stop], v_BxKvxSxH[:, :, first:stop]
        outputs.append(_attend_block(q, k, v, window))
    return _heads_last(jnp.concatenate(outputs, axis=3))


def attention_at(
    q_BxAxQhxH: jax.Array,
    k_BxSxKvxH: jax.Array,
    v_BxSxKvxH: jax.Array,
    position_BxA: jax.Array,
    *,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """Causal attention of the tokens at some positions (int32) of a sequence -> [B, A, Qh, H]."""
    q_BxKvxGxAxH = _heads_first(q_BxAxQhxH, k_BxSxKvxH.shape[2])
    visible_BxAxS = _visible(position_BxA, jnp.arange(k_BxSxKvxH.shape[1])[None, :], window)
    scores = _product("bkgah,bskh->bkgas", q_BxKvxGxAxH, k_BxSxKvxH)
    scores = jnp.where(visible_BxAxS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxKvxH.dtype)
    return _heads_last(jnp.einsum("bkgas,bskh->bkgah", weights, v_BxSxKvxH))


@jax.custom_vjp
def _attend_block(
    q_BxKvxGxQxH: jax.Array, k_BxKvxTxH: jax.Array, v_BxKvxTxH: jax.Array, window: jax.Array | None
) -> jax.Array:
    """Attention of the last Q of T positions; its backward pass makes the scores again."""
    return _attend_block_forward(q_BxKvxGxQxH, k_BxKvxTxH, v_BxKvxTxH, window)[0]


def _masked_scores(q, k, window):
    """float32 [B, Kv, G * Q, T] of the last Q of T positions."""
    queries, keys = q.shape[3], k.shape[2]
    scores = _product("bkqh,bkth->bkqt", _merge_groups(q), k).reshape(*q.shape[:4], keys)
    visible = _visible(jnp.arange(keys - queries, keys), jnp.arange(keys), window)
    return _merge_groups(jnp.where(visible[None, None, None], scores, MASKED))


def _attend_block_forward(q, k, v, window):
    scores_BxKvxQxT = _masked_scores(q, k, window)
    largest_BxKvxQx1 = jnp.max(scores_BxKvxQxT, axis=-1, keepdims=True)
    p_BxKvxQxT = jnp.exp(scores_BxKvxQxT - largest_BxKvxQx1)
    sum_BxKvxQx1 = jnp.sum(p_BxKvxQxT, axis=-1, keepdims=True)
    out_BxKvxQxH = _product("bkqt,bkth->bkqh", p_BxKvxQxT.astype(v.dtype), v) / sum_BxKvxQx1
    normaliser = checkpoint_name(largest_BxKvxQx1 + jnp.log(sum_BxKvxQx1), "normaliser")
    return out_BxKvxQxH.astype(q.dtype).reshape(q.shape), (q, k, v, window, normaliser)


def _attend_block_backward(saved, d_out):
    q, k, v, window, normaliser_BxKvxQx1 = saved
    q_BxKvxQxH, do_BxKvxQxH = _merge_groups(q), _merge_groups(d_out)
    p_BxKvxQxT = jnp.exp(_masked_scores(q, k, window) - normaliser_BxKvxQx1)  # masked: exactly zero
    dp_BxKvxQxT = _product("bkqh,bkth->bkqt", do_BxKvxQxH, v)
    p_dp_BxKvxQxT = p_BxKvxQxT * dp_BxKvxQxT
    # softmax: ds = p (dp - sum_t p dp)
    ds_BxKvxQxT = p_dp_BxKvxQxT - p_BxKvxQxT * jnp.sum(p_dp_BxKvxQxT, axis=-1, keepdims=True)
    ds_BxKvxQxT = ds_BxKvxQxT.astype(q.dtype)
    dq = jnp.einsum("bkqt,bkth->bkqh", ds_BxKvxQxT, k).reshape(q.shape)
    dk = jnp.einsum("bkqt,bkqh->bkth", ds_BxKvxQxT, q_BxKvxQxH)
    dv = jnp.einsum("bkqt,bkqh->bkth", p_BxKvxQxT.astype(v.dtype), do_BxKvxQxH)
    return dq, dk, dv, None


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def splash_attention(
    q_BxSxQhxH: jax.Array,
    k_BxSxKvxH: jax.Array,
    v_BxSxKvxH: jax.Array,
    *,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`causal_attention` by the kernel for TPUs, which skips blocks that are masked as a whole.

    The compiler does not partition it: every device must hold its rows and all heads. `interpret`
    runs the kernel on other devices, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = q_BxSxQhxH.shape[1:]
    padded = -(-length // 128) * 128  # the padding comes last: no real token sees it
    block = next(size for size in (512, 256, 128) if padded % size == 0)
    shape = (padded, padded)
    mask: Any = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        residual_checkpoint_name="normaliser",
        interpret=interpret,
    )

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    q, k, v = map(heads_first, (q_BxSxQhxH * head_dim**-0.5, k_BxSxKvxH, v_BxSxKvxH))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]


def _visible(queries_Q: jax.Array, keys_T: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """Whether queries at positions [..., Q] see keys at positions [..., T] -> [..., Q, T]."""
    distance = queries_Q[..., :, None] - keys_T[..., None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def _merge_groups(x: jax.Array) -> jax.Array:
    """[B, Kv, G, Q, ...] -> [B, Kv, G * Q, ...]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def cached_attention(
    q_BxTuxQhxH: jax.Array,
    new_kv: Sequence[jax.Array],
    prompt_kv: Sequence[jax.Array],
    pool_kv: Sequence[jax.Array],
    prompt_lengths_B: jax.Array,
    paths: BeamPaths,
    packed: Packing,
    *,
    window: int | jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of a user's Tu new tokens to prompt, pool and each other -> [B, Tu, Qh, H].

    A token sees its user's prompt (keys and values [B, Kv, S, H]) up to its length, of the pool
    [B, Kv, Sl, H] the slots that its beam has seen, and of the new tokens [B, Tu, Kv, H] those of
    its beam up to itself. What filler attends to is undefined.
    """
    heads_first = [x.swapaxes(1, 2) for x in new_kv]
    keys, values = zip(prompt_kv, pool_kv, heads_first, strict=True)  # [B, Kv, T, H] each
    prompt_size, pool_size = keys[0].shape[2], keys[1].shape[2]
    visible = _visible_in_cache(prompt_size, prompt_lengths_B, paths, packed, window)
    if implementation == "cudnn":
        return masked_attention(q_BxTuxQhxH, keys, values, visible)
    q_BxKvxGxTuxH = _heads_first(q_BxTuxQhxH, new_kv[0].shape[2])
    queries = _merge_groups(q_BxKvxGxTuxH)

    def scores(k_BxKvxTxH, visible_BxTuxT):
        product = _product("bkqh,bkth->bkqt", queries, k_BxKvxTxH)
        product = product.reshape(*q_BxKvxGxTuxH.shape[:4], -1)
        return jnp.where(visible_BxTuxT[:, None, None], product, MASKED)

    weights = jnp.concatenate([scores(*pair) for pair in zip(keys, visible, strict=True)], axis=-1)
    weights = _merge_groups(jax.nn.softmax(weights, axis=-1).astype(values[0].dtype))
    parts = jnp.split(weights, [prompt_size, prompt_size + pool_size], axis=-1)
    summed = [jnp.einsum("bkqt,bkth->bkqh", *pair) for pair in zip(parts, values, strict=True)]
    return _heads_last((summed[0] + summed[1] + summed[2]).reshape(q_BxKvxGxTuxH.shape))


def masked_attention(
    q_BxTuxQhxH: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    visible: Sequence[jax.Array],
) -> jax.Array:
    """Attention to parts [B, Kv, T, H], of which each token sees some (bool [B, Tu or 1, T]).

    -> [B, Tu, Qh, H], by cuDNN's kernel. It wants the parts as one array: a copy of them is a
    fraction of the scores that it does not write.
    """
    k_BxTxKvxH, v_BxTxKvxH = (
        jnp.concatenate(parts, axis=2).swapaxes(1, 2) for parts in (keys, values)
    )
    seen = [jnp.broadcast_to(x, (*q_BxTuxQhxH.shape[:2], x.shape[2])) for x in visible]
    mask_Bx1xTuxT = jnp.concatenate(seen, axis=2)[:, None]
    qkv = q_BxTuxQhxH, k_BxTxKvxH, v_BxTxKvxH
    return jax.nn.dot_product_attention(*qkv, mask=mask_Bx1xTuxT, implementation="cudnn")


def _visible_in_cache(
    prompt_size: int,
    prompt_lengths_B: jax.Array,
    paths: BeamPaths,
    packed: Packing,
    window: int | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the new tokens see the prompt's, the pool's and each other's -> bool [B, Tu, T]."""
    beam_BxTu, position_BxTu = packed.beam_BxTu, packed.position_BxTu
    beam_BxTux1 = jnp.maximum(beam_BxTu, 0)[:, :, None]
    on_prompt = jnp.arange(prompt_size)[None, None, :] < prompt_lengths_B[:, None, None]
    on_pool = jnp.take_along_axis(paths.seen_BxMxSl, beam_BxTux1, axis=1)
    on_new = beam_BxTu[:, :, None] == beam_BxTu[:, None, :]
    on_new &= _visible(position_BxTu, position_BxTu, window)
    if window is not None:
        # Positions counted from the prompt's end.
        read_BxTu = jnp.take_along_axis(paths.length_BxM, beam_BxTux1[:, :, 0], axis=1)
        queries_BxTu = read_BxTu + position_BxTu
        prompt_BxS = jnp.arange(prompt_size)[None, :] - prompt_lengths_B[:, None]
        on_prompt = on_prompt & _visible(queries_BxTu, prompt_BxS, window)
        on_pool &= _visible(queries_BxTu, paths.position_BxSl, window)
    return on_prompt, on_pool, on_new
