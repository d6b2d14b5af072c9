"""The optimizer: its schedule and moments, the weight decay of parts, and parts that are held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tca4rec_jax.distributed.sharding import make_mesh, tree_shardings
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from tca4rec_jax.training.state import hold

PARAMS = {
    "adapters": {"q_proj": {"a": jnp.array([1.0, -2.0])}},
    "projector": {"layers": {"weight_0": jnp.array([[3.0], [-1.0]])}},
}
RATE = 0.01


def change(held=(), **decay_of):
    """What the first update adds to each parameter, by part."""

    def loss(params):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(hold(params, held)))

    config = OptimizerConfig(RATE, warmup_steps=0, weight_decay=0.1, clip=0.0)
    optimizer = make_optimizer(config, 2, decay_of=tuple(decay_of.items()))
    updates, _ = optimizer.update(jax.grad(loss)(PARAMS), optimizer.init(PARAMS), PARAMS)
    return {part: np.ravel(jax.tree.leaves(tree)[0]) for part, tree in updates.items()}


def test_every_part_has_its_weight_decay():
    """Adam's first step is the rate against the gradient's sign, here always above 0."""
    found = change(projector=0.5)
    np.testing.assert_allclose(found["adapters"], [-RATE * 1.1, -RATE * 0.8], rtol=1e-4)
    np.testing.assert_allclose(found["projector"], [-RATE * 2.5, -RATE * 0.5], rtol=1e-4)


@pytest.mark.parametrize("part", PARAMS)
def test_a_part_that_is_held_stays_as_it_is(part):
    found = change(held=[part], **{part: 0.0})
    np.testing.assert_array_equal(found.pop(part), 0.0)
    ((other, values),) = found.items()
    np.testing.assert_array_equal(values, change()[other])


STEPS = np.arange(13)


@pytest.mark.parametrize(
    ("fields", "after"),
    [
        ({"schedule": "linear"}, 2 - STEPS / 4),
        ({"schedule": "cosine"}, 1 + np.cos(np.pi * STEPS / 8)),
        ({"schedule": "constant"}, 2 + 0 * STEPS),
        ({"decay_steps": 24}, 2 - STEPS / 10),
        ({"warmup_steps": 99, "warmup_fraction": 0.3}, 2 - STEPS / 4),  # 3.6 steps
        ({"warmup_from_zero": True}, 2 - STEPS / 4),
    ],
)
def test_schedules(fields, after):
    """Of 12 steps, 4 of which warm up, against their formulas."""
    fields = {"warmup_steps": 4} | fields
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **fields), 12)
    first = [0, 0.5, 1.0, 1.5] if "warmup_from_zero" in fields else [0.5, 0.875, 1.25, 1.625]
    np.testing.assert_allclose([schedule(step) for step in range(4)], first)
    np.testing.assert_allclose([schedule(4 + step) for step in range(9)], after[:9], atol=1e-6)


def test_a_warm_up_may_be_as_long_as_a_short_run():
    """Of 10 steps, if the rate falls until later."""
    config = OptimizerConfig(2.0, warmup_steps=20, warmup_from_zero=True, decay_steps=160)
    schedule = make_schedule(config, 10)
    np.testing.assert_allclose([schedule(step) for step in range(10)], np.arange(10) / 10, 1e-6)


def test_a_constant_rate_has_no_last_step():
    with pytest.raises(ValueError, match=r"optimizer.decay_steps is 9, but .*=constant"):
        OptimizerConfig(schedule="constant", decay_steps=9)


def matrices(seed):
    """A gradient of two layers' matrices, and of a norm, which is too small to be factored."""
    keys = jax.random.split(jax.random.key(seed))
    shapes = {"q_proj": (2, 128, 256), "attn_norm": (2, 128)}
    layers = zip(shapes.items(), keys, strict=True)
    return {"layers": {name: jax.random.normal(key, shape) for (name, shape), key in layers}}


def updates_of(config, gradients, mesh=None):
    """The updates by a sequence of gradients, and the last state, on a mesh or on one device."""
    params, optimizer = jax.tree.map(jnp.zeros_like, gradients[0]), make_optimizer(config, 100)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    if mesh is not None:
        architecture = DecoderConfig(256, 128, 256, 2, 4, 2, 64)
        places = tree_shardings(mesh, architecture, (params, state))
        params, state = jax.device_put((params, state), places)
        update = jax.jit(optimizer.update, out_shardings=places)
    found = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found, state


PLAIN = OptimizerConfig(1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip=0.0)


def test_factored_moments_are_adafactors():
    """A row and a column of every layer's squares instead of all, and momentum in bfloat16."""
    gradients = [matrices(seed) for seed in range(3)]
    found, state = updates_of(dataclasses.replace(PLAIN, moments="factored"), gradients)
    row, column, momentum = np.zeros((2, 128, 1)), np.zeros((2, 1, 256)), 0.0
    for number, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient["layers"]["q_proj"], np.float64)
        decay = min(1 - number**-0.8, 0.999)
        row = decay * row + (1 - decay) * np.mean(g**2, axis=2, keepdims=True)
        column = decay * column + (1 - decay) * np.mean(g**2, axis=1, keepdims=True)
        scaled = g / np.sqrt(row * column / np.mean(row, axis=1, keepdims=True))
        momentum = 0.9 * momentum + 0.1 * scaled
        expected = -momentum / (1 - 0.9**number)
        np.testing.assert_allclose(found[number - 1]["layers"]["q_proj"], expected, atol=0.02)
    values = {"bfloat16": 0, "float32": 0, "int32": 0}
    for leaf in jax.tree.leaves(state):
        values[leaf.dtype.name] += leaf.size
    weights, norms = 2 * 128 * 256, 2 * 128
    assert values["bfloat16"] == weights + norms
    assert values["float32"] <= 2 * (128 + 256) + norms + 8


def test_factored_moments_on_a_split_mesh():
    """The momentum lies where the weights do, rows and columns everywhere."""
    config = dataclasses.replace(PLAIN, moments="factored")
    gradients = [matrices(seed) for seed in range(2)]
    expected, _ = updates_of(config, gradients)
    found, state = updates_of(config, gradients, make_mesh(1, 2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), found, expected)
    parts = {
        (leaf.dtype.name, leaf.shape): leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(state)
    }
    assert parts["bfloat16", (2, 128, 256)] == (2, 64, 256)
    assert parts["float32", (2, 128)] == (2, 128)
    assert parts["float32", (2, 256)] == (2, 256)


def test_a_first_moment_in_bfloat16_is_adams():
    gradients = [matrices(seed) for seed in range(3)]
    (expected, _), (found, state) = (
        updates_of(dataclasses.replace(PLAIN, moments=kind), gradients)
        for kind in ("float32", "bfloat16")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), found, expected)
    adam = next(part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
    assert adam.mu["layers"]["q_proj"].dtype == jnp.bfloat16
    assert adam.nu["layers"]["q_proj"].dtype == jnp.float32


def is_adam(part):
    return hasattr(part, "mu")


def test_without_parts_it_is_adamw():
    config = OptimizerConfig(RATE, warmup_steps=1, weight_decay=0.1, epsilon=1e-6)
    optimizer = make_optimizer(config, 5)
    schedule = optax.join_schedules(
        [optax.linear_schedule(RATE, RATE, 1), optax.linear_schedule(RATE, 0.0, 4)], [1]
    )
    adamw = optax.adamw(schedule, weight_decay=0.1, eps=1e-6)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state, expected = optimizer.init(PARAMS), adamw.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(expected)  # of checkpoints
    for seed in range(3):
        gradients = jax.tree.map(
            lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), PARAMS
        )
        ours, state = optimizer.update(gradients, state, PARAMS)
        theirs, expected = adamw.update(gradients, expected, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
