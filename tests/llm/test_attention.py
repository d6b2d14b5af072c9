"""Causal attention and its handwritten gradient against the textbook formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.llm.attention import (
    causal_attention,
    check_implementation,
    masked_attention,
    rotary_frequencies,
    rotary_tables,
    rotate,
    splash_attention,
)


def textbook_attention(q, k, v, window):
    """Repeats the keys for the query heads that share them and masks the whole square."""
    length, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
    scores = jnp.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        visible &= jnp.triu(jnp.ones((length, length), bool), 1 - window)
    visible = visible[None, None]
    return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("block", "window"), [(3, None), (4, 5), (16, 3), (3, 1)])
def test_causal_attention_and_its_gradient(block, window, traced):
    """A window that the compiler knows, or that is an array as where layers differ."""
    generator = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(generator.normal(size=(2, 10, heads, 4)), jnp.float32) for heads in (6, 2, 2, 6)
    )

    @jax.jit
    def values(q, k, v, array):
        def loss(attention, *inputs):
            out = attention(*inputs)
            return jnp.sum(out * weights), out

        def gradient(attention):
            return jax.value_and_grad(
                lambda *inputs: loss(attention, *inputs), argnums=(0, 1, 2), has_aux=True
            )(q, k, v)

        seen = array if traced and window is not None else window
        blocked = gradient(lambda *inputs: causal_attention(*inputs, window=seen, block=block))
        return blocked, gradient(lambda *inputs: textbook_attention(*inputs, window))

    result, expected = values(q, k, v, jnp.int32(window or 0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), result, expected
    )


@pytest.mark.parametrize(("length", "window"), [(130, None), (200, 40), (256, 1)])
def test_splash_attention_and_its_gradient(length, window):
    """Interpreted, on lengths that have to be padded and one that has not."""
    generator = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(generator.normal(size=(2, length, heads, 16)), jnp.float32)
        for heads in (4, 2, 2, 4)
    )

    def gradient(attention):
        def loss(*inputs):
            out = attention(*inputs)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    found = gradient(lambda *inputs: splash_attention(*inputs, window=window, interpret=True))
    expected = gradient(lambda *inputs: textbook_attention(*inputs, window))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5), found, expected
    )


def test_splash_is_refused_elsewhere():
    check_implementation("splash", "tpu", "float32")
    with pytest.raises(ValueError, match="'splash', which needs a TPU, not gpu: use 'xla'"):
        check_implementation("splash", "gpu", "bfloat16")


def test_cudnn_lowers_for_a_gpu_and_is_refused_elsewhere(monkeypatch):
    """No GPU here: the program is made for one, gradient and all, and not run."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (9, 3))

    def total(q, k, v):
        return jnp.sum(causal_attention(q, k, v, implementation="cudnn").astype(jnp.float32))

    program = jax.jit(jax.grad(total)).trace(q, k, k).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmaxBackward" in program.as_text()
    parts = [jax.ShapeDtypeStruct((2, 3, size, 64), jnp.bfloat16) for size in (100, 7)]
    seen = [jax.ShapeDtypeStruct((2, rows, size), bool) for rows, size in ((1, 100), (256, 7))]
    traced = jax.jit(masked_attention).trace(q, parts, parts, seen)
    assert "__cudnn$fmhaScaleBiasSoftmax" in traced.lower(lowering_platforms=("cuda",)).as_text()
    check_implementation("cudnn", "gpu", "bfloat16")
    for platform, dtype in (("cpu", "bfloat16"), ("gpu", "float32")):
        with pytest.raises(ValueError, match=f"llm.attention is 'cudnn'.*not {platform}"):
            check_implementation("cudnn", platform, dtype)


def test_rotation_depends_on_distance_only():
    generator = np.random.default_rng(1)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 8)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        tables = [rotary_tables(jnp.array([p]), 8, 100.0) for p in (q_position, k_position)]
        return jnp.sum(rotate(q, *tables[0]) * rotate(k, *tables[1]))

    np.testing.assert_allclose(score(7, 3), score(15, 11), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotary_angles_are_products_of_float32():
    """A dot would round its inputs on accelerators: position 257 to 256 in bfloat16."""
    positions = np.array([[0, 257, 8191]])
    tables = jax.jit(lambda p: rotary_tables(p, 64, 1e5))
    assert "dot" not in tables.lower(positions).as_text()
    angles = positions[..., None].astype(np.float32) * rotary_frequencies(64, 1e5)
    for found, exact in zip(tables(positions), (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-6)
