"""The optimizer of a decoder's parts: their own weight decay, and parts that are held."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tca4rec_jax.training.state import hold, make_optimizer, make_schedule

PARAMS = {
    "adapters": {"q_proj": {"a": jnp.array([1.0, -2.0])}},
    "projector": {"layers": {"weight_0": jnp.array([[3.0], [-1.0]])}},
}
RATE = 0.01


def change(held=(), **decay_of):
    """What the first update adds to each parameter, by part."""

    def loss(params):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(hold(params, held)))

    optimizer = make_optimizer(
        learning_rate=RATE,
        warmup_steps=0,
        total_steps=2,
        weight_decay=0.1,
        clip=1e9,
        decay_of=decay_of,
    )
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


def test_the_cosine_schedule():
    """Half a wave after the warm-up, against its formula."""
    schedule = make_schedule(learning_rate=2.0, warmup_steps=4, total_steps=12, schedule="cosine")
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0.5, 0.875, 1.25, 1.625])
    left = [1 + np.cos(np.pi * step / 8) for step in range(9)]
    np.testing.assert_allclose([schedule(4 + step) for step in range(9)], left, atol=1e-6)


def test_without_parts_it_is_adamw():
    optimizer = make_optimizer(
        learning_rate=RATE, warmup_steps=1, total_steps=5, weight_decay=0.1, clip=1.0
    )
    schedule = optax.join_schedules(
        [optax.linear_schedule(RATE, RATE, 1), optax.linear_schedule(RATE, 0.0, 4)], [1]
    )
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    state, expected = optimizer.init(PARAMS), adamw.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(expected)  # of checkpoints
    for seed in range(3):
        gradients = jax.tree.map(
            lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), PARAMS
        )
        ours, state = optimizer.update(gradients, state, PARAMS)
        theirs, expected = adamw.update(gradients, expected, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
