"""Grouped-query attention: causal over a sequence, and over a cache that beams share.

With a sliding window a token sees itself and the `window - 1` tokens before it.

Axis letters: B batch, S prompt sequence, Q new tokens of a user, P pool, M beams,
N query heads, K kv heads, G query heads per kv head (N = K * G), H head dim. Keys are never
repeated for the query heads that share them; scores and softmax are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import RopeScaling
from tca4rec_jax.llm.kv_cache import BeamPaths

# Finite, so that a masked score underflows to exactly zero without inf - inf.
MASKED = -1e30
IMPLEMENTATIONS = ("xla", "cudnn", "splash")


def check_implementation(name: str, platform: str, dtype: str) -> None:
    """Raises UserError if training cannot use llm.attention `name` here.

    platform: of the devices, as jax names it; dtype: of the activations.
    """
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
        kept = 0.0  # the share of a frequency that is not divided
        if scaling.kind == "llama3":
            turns = scaling.original_max_positions * frequencies / (2 * np.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [..., H/2] (float32) of the rotary angles at integer positions [...]."""
    frequencies = jnp.asarray(rotary_frequencies(head_dim, theta, scaling))
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


def _product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum accumulated and returned in float32."""
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def causal_attention(
    q_BxSxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    window: int | jax.Array | None = None,
    implementation: str = "xla",
    block: int = 128,
) -> jax.Array:
    """Causal attention over right-padded sequences -> [B, S, N, H].

    implementation: one of IMPLEMENTATIONS; 'cudnn' and 'splash' are fused kernels for NVIDIA GPUs
    and TPUs (check_implementation), whose window must be an int. For 'xla' it may be traced, as
    where layers differ in theirs.

    Queries go in blocks that read only the keys up to the block's end, which saves the upper
    triangle, and from the block's window on, if that is an int. Padding needs no mask: it lies
    after every real token.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BxSxNxH,
            k_BxSxKxH,
            v_BxSxKxH,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    if implementation == "splash":
        return splash_attention(q_BxSxNxH, k_BxSxKxH, v_BxSxKxH, window=window)
    length, num_kv_heads = k_BxSxKxH.shape[1:3]
    # One transpose of q, k and v, so that no product needs one of the much larger scores.
    q_BxKxGxSxH = _grouped(q_BxSxNxH, num_kv_heads).transpose(0, 2, 3, 1, 4)
    k_BxKxSxH, v_BxKxSxH = k_BxSxKxH.swapaxes(1, 2), v_BxSxKxH.swapaxes(1, 2)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - window + 1) if isinstance(window, int) else 0
        outputs.append(
            _attend_block(
                q_BxKxGxSxH[:, :, :, start:stop],
                k_BxKxSxH[:, :, first:stop],
                v_BxKxSxH[:, :, first:stop],
                window,
            )
        )
    out_BxKxGxSxH = jnp.concatenate(outputs, axis=3)
    return out_BxKxGxSxH.transpose(0, 3, 1, 2, 4).reshape(q_BxSxNxH.shape)


@jax.custom_vjp
def _attend_block(
    q_BxKxGxQxH: jax.Array, k_BxKxTxH: jax.Array, v_BxKxTxH: jax.Array, window: jax.Array | None
) -> jax.Array:
    """Attention of the last Q of T positions; its backward pass makes the scores again."""
    return _attend_block_forward(q_BxKxGxQxH, k_BxKxTxH, v_BxKxTxH, window)[0]


def _masked_scores(q, k, window):
    """float32 [B, K, G * Q, T] of the last Q of T positions."""
    batch, kv_heads, groups, queries, _ = q.shape
    keys = k.shape[2]
    scores = _product("bkqh,bkth->bkqt", _merge_groups(q), k)
    visible = _visible(jnp.arange(keys - queries, keys), jnp.arange(keys), window)
    scores = scores.reshape(batch, kv_heads, groups, queries, keys)
    return _merge_groups(jnp.where(visible[None, None, None], scores, MASKED))


def _attend_block_forward(q, k, v, window):
    scores_BxKxQxT = _masked_scores(q, k, window)
    largest_BxKxQx1 = jnp.max(scores_BxKxQxT, axis=-1, keepdims=True)
    p_BxKxQxT = jnp.exp(scores_BxKxQxT - largest_BxKxQx1)
    sum_BxKxQx1 = jnp.sum(p_BxKxQxT, axis=-1, keepdims=True)
    out_BxKxQxH = _product("bkqt,bkth->bkqh", p_BxKxQxT.astype(v.dtype), v) / sum_BxKxQx1
    normaliser = checkpoint_name(largest_BxKxQx1 + jnp.log(sum_BxKxQx1), "normaliser")
    return out_BxKxQxH.astype(q.dtype).reshape(q.shape), (q, k, v, window, normaliser)


def _attend_block_backward(saved, d_out):
    q, k, v, window, normaliser_BxKxQx1 = saved
    q_BxKxQxH, do_BxKxQxH = _merge_groups(q), _merge_groups(d_out)
    p_BxKxQxT = jnp.exp(_masked_scores(q, k, window) - normaliser_BxKxQx1)  # masked: exactly zero
    dp_BxKxQxT = _product("bkqh,bkth->bkqt", do_BxKxQxH, v)
    p_dp_BxKxQxT = p_BxKxQxT * dp_BxKxQxT
    # softmax: ds = p (dp - sum_t p dp)
    ds_BxKxQxT = p_dp_BxKxQxT - p_BxKxQxT * jnp.sum(p_dp_BxKxQxT, axis=-1, keepdims=True)
    ds_BxKxQxT = ds_BxKxQxT.astype(q.dtype)
    dq = jnp.einsum("bkqt,bkth->bkqh", ds_BxKxQxT, k).reshape(q.shape)
    dk = jnp.einsum("bkqt,bkqh->bkth", ds_BxKxQxT, q_BxKxQxH)
    dv = jnp.einsum("bkqt,bkqh->bkth", p_BxKxQxT.astype(v.dtype), do_BxKxQxH)
    return dq, dk, dv, None


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def splash_attention(
    q_BxSxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What causal_attention does, by the kernel for TPUs that never visits what nothing sees.

    Not partitioned by the compiler: every device must hold its rows and all heads.
    interpret: runs it elsewhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = q_BxSxNxH.shape[1:]
    padded = -(-length // 128) * 128  # the padding comes last: no real token sees it
    block = next(size for size in (512, 256, 128) if padded % size == 0)
    shape = (padded, padded)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha_single_device(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name="normaliser",
        interpret=interpret,
    )

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    q, k, v = map(heads_first, (q_BxSxNxH * head_dim**-0.5, k_BxSxKxH, v_BxSxKxH))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]


def _visible(queries_Q: jax.Array, keys_K: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """Whether queries at positions [..., Q] see keys at positions [..., K] -> [..., Q, K]."""
    distance = queries_Q[..., :, None] - keys_K[..., None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def _merge_groups(x: jax.Array) -> jax.Array:
    """[B, K, G, Q, ...] -> [B, K, G * Q, ...]."""
    batch, kv_heads, groups, queries, last = x.shape
    return x.reshape(batch, kv_heads, groups * queries, last)


def cached_attention(
    q_BxQxNxH: jax.Array,
    new_kv: tuple[jax.Array, jax.Array],
    prompt_kv: tuple[jax.Array, jax.Array],
    pool_kv: tuple[jax.Array, jax.Array],
    prompt_lengths_B: jax.Array,
    paths: BeamPaths,
    beam_BxQ: jax.Array,
    place_BxQ: jax.Array,
    *,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """Attention of Q new tokens per user over prompt, path and themselves -> [B, Q, N, H].

    new_kv [B, Q, K, H]; prompt_kv [B, S, K, H] and pool_kv [B, P, K, H], one for all beams of a
    user. The prompt counts up to its length, of the pool the slots that the token's beam has seen,
    of the new tokens those of its beam up to its place (see `kv_cache.Packing`; what a beam of -1
    attends to is without meaning).
    """
    kv_heads = new_kv[0].shape[2]
    # [B, K, keys, H] each, and one transpose of q, so that no product needs one of the scores.
    keys, values = zip(
        *((k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in (prompt_kv, pool_kv, new_kv)),
        strict=True,
    )
    q_BxKxGxQxH = _grouped(q_BxQxNxH, kv_heads).transpose(0, 2, 3, 1, 4)
    prompt_size, pool_size = keys[0].shape[2], keys[1].shape[2]
    beam_BxQx1 = jnp.maximum(beam_BxQ, 0)[:, :, None]
    on_prompt = jnp.arange(prompt_size)[None, None, :] < prompt_lengths_B[:, None, None]
    on_pool = jnp.take_along_axis(paths.seen_BxMxSl, beam_BxQx1, axis=1)
    on_new = beam_BxQ[:, :, None] == beam_BxQ[:, None, :]
    on_new &= _visible(place_BxQ, place_BxQ, window)
    if window is not None:
        # Positions counted from the prompt's end.
        queries_BxQ = jnp.take_along_axis(paths.length_BxM, beam_BxQx1[:, :, 0], axis=1) + place_BxQ
        prompt_BxS = jnp.arange(prompt_size)[None, :] - prompt_lengths_B[:, None]
        on_prompt = on_prompt & _visible(queries_BxQ, prompt_BxS, window)
        on_pool &= _visible(queries_BxQ, paths.position_BxSl, window)
    queries = _merge_groups(q_BxKxGxQxH)

    def scores(k_BxKxTxH, visible_BxQxT):
        product = _product("bkqh,bkth->bkqt", queries, k_BxKxTxH)
        product = product.reshape(*q_BxKxGxQxH.shape[:4], -1)
        return jnp.where(visible_BxQxT[:, None, None], product, MASKED)

    visible = (on_prompt, on_pool, on_new)
    weights = jnp.concatenate([scores(*pair) for pair in zip(keys, visible, strict=True)], axis=-1)
    weights = _merge_groups(jax.nn.softmax(weights, axis=-1).astype(values[0].dtype))
    parts = jnp.split(weights, [prompt_size, prompt_size + pool_size], axis=-1)
    out = sum(jnp.einsum("bkqt,bkth->bkqh", part, v) for part, v in zip(parts, values, strict=True))
    return out.reshape(q_BxKxGxQxH.shape).transpose(0, 3, 1, 2, 4).reshape(q_BxQxNxH.shape)
