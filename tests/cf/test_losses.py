import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.cf import losses
from tca4rec_jax.cf.losses import (
    SeenByUser,
    draw_popular,
    sampled_loss,
    sampled_softmax_loss,
    softmax_loss,
    user_negatives,
)
from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.cf.windows import TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import ItemSequences


@pytest.mark.parametrize("biased", [False, True])
def test_losses_against_numpy(biased):
    rng = np.random.default_rng(0)
    vectors, table = rng.normal(size=(2, 3, 4)), rng.normal(size=(7, 4))
    bias = rng.normal(size=7) if biased else None
    target, negative = rng.integers(0, 7, (2, 3)), rng.integers(0, 7, (2, 3, 5))
    logits = vectors @ table.T + (bias if biased else 0)
    positives = np.take_along_axis(logits, target[:, :, None], 2)
    negatives = np.take_along_axis(logits, negative, 2)

    def log_sigmoid(x):
        return -np.log1p(np.exp(-x))

    queries = TrainingQueries(
        jnp.asarray(vectors, jnp.float32),
        target,
        jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), CFItems(table, bias)),
    )
    expected = {
        "bpr": -log_sigmoid(positives - negatives).mean(-1),
        "bce": -log_sigmoid(positives)[:, :, 0] - log_sigmoid(-negatives).mean(-1),
    }
    for loss, values in expected.items():
        np.testing.assert_allclose(sampled_loss(loss, queries, target, negative), values, rtol=1e-4)
    log_share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_share, target[:, :, None], 2)[:, :, 0]
    supervised = jnp.asarray(rng.random((2, 3)) < 0.5)
    expected_sum = -picked[supervised].sum()
    np.testing.assert_allclose(softmax_loss(queries, target, supervised), expected_sum, rtol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_a_sampled_softmax_has_the_gradient_of_the_whole_one_in_expectation(biased):
    rng = np.random.default_rng(0)
    item_n = np.repeat(np.arange(6), 1 << np.arange(6))
    rows = ItemSequences(np.arange(1), item_n, np.array([0, 63]), np.full(63, -1))
    vector = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=7), jnp.float32) if biased else None
    items = CFItems(jnp.asarray(rng.normal(size=(7, 4)), jnp.float32), bias)
    target, supervised = (
        jnp.asarray(rng.integers(0, 7, (2, 3))),
        jnp.asarray(rng.random((2, 3)) < 0.7),
    )
    log_share = jnp.asarray(popularity_logits(rows, 7))

    def sampled(args, key, log_share):
        drawn = draw_popular(key, jnp.asarray(rows.items), 4096, 7)
        queries = TrainingQueries(args[0], None, args[1])
        return sampled_softmax_loss(queries, target, supervised, drawn, log_share)

    @jax.jit
    def mean_gradient(log_share):
        keys = jax.random.split(jax.random.key(0), 100)
        of_keys = jax.vmap(jax.grad(sampled), in_axes=(None, 0, None))
        gradients = jax.tree.leaves(of_keys((vector, items), keys, log_share))
        return jnp.concatenate([one.mean(0).ravel() for one in gradients])

    def whole(args):
        return softmax_loss(TrainingQueries(args[0], None, args[1]), target, supervised)

    gradient = jax.tree.leaves(jax.grad(whole)((vector, items)))
    expected = np.concatenate([np.ravel(one) for one in gradient])
    np.testing.assert_allclose(mean_gradient(log_share), expected, atol=0.005)
    uncorrected = mean_gradient(jnp.full(7, -np.log(7.0)))
    assert np.abs(uncorrected - expected).max() > 0.1


def test_items_are_drawn_as_often_as_their_share_says():
    items = jnp.asarray([0, 1, 1, 1, 3, 3])
    drawn = draw_popular(jax.random.key(0), items, 20_000, 5)
    expected = np.array([2, 4, 1, 3, 1]) / 11
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_chunks_give_the_loss_and_gradients_of_the_whole_softmax(biased, count, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 4)
    rng = np.random.default_rng(count)
    vector = jnp.asarray(5 * rng.normal(size=(11, 4)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)
    items = CFItems(table, jnp.asarray(rng.normal(size=7), jnp.float32) if biased else None)
    target = jnp.asarray(rng.integers(0, 7, 11))
    supervised = jnp.asarray(rng.permutation(11) < count)

    def whole(vector, items):
        queries = TrainingQueries(vector[None], None, items)
        return softmax_loss(queries, target[None], supervised[None])

    def chunks(vector, items):
        return 3.0 * losses.chunked_softmax_loss(vector, items, target, supervised)

    got = jax.value_and_grad(chunks, argnums=(0, 1))(vector, items)
    expected = jax.value_and_grad(whole, argnums=(0, 1))(vector, items)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, 3.0 * theirs, atol=2e-5)


def test_many_logits_are_computed_in_chunks(monkeypatch):
    queries = TrainingQueries(jnp.ones((2, 3, 4)), None, CFItems(jnp.eye(7, 4), None))
    target, supervised = jnp.ones((2, 3), int), jnp.ones((2, 3), bool)

    def program():
        return str(jax.make_jaxpr(lambda: softmax_loss(queries, target, supervised))())

    few = program()
    monkeypatch.setattr(losses, "_MOST_LOGITS", 41)
    many = program()
    assert ("custom_vjp" in few, "custom_vjp" in many) == (False, True)


def test_user_negatives_are_uniform_over_what_the_user_never_had():
    items = [[0, 3, 3, 9], [5], [6, 7, 8, 9, 0]]
    offsets = np.cumsum([0, *map(len, items)])
    rows = ItemSequences(np.array([4, 7, 9]), np.concatenate(items), offsets, np.full(10, -1))
    seen = SeenByUser.of(rows, 10)
    drawn = np.asarray(user_negatives(jax.random.key(0), seen, jnp.arange(3), 20000, 10))
    for user, had in enumerate(items):
        allowed = np.setdiff1d(np.arange(10), had)
        share = np.bincount(drawn[user], minlength=10) / 20000
        np.testing.assert_allclose(share[allowed], 1 / len(allowed), atol=0.012)
        assert share[allowed].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="user 0 .* has seen all 1 items"):
        SeenByUser.of(
            ItemSequences(np.arange(2), np.zeros(2, int), np.arange(3), np.full(2, -1)), 1
        )
