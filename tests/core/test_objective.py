"""The sparse objective against its dense definition, and its gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.decisions import Targets, title_decisions
from tca4rec_jax.core.losses import (
    SoftLabels,
    children_loss,
    children_loss_of_logits,
    of_logits,
    tca_loss,
    vocabulary_loss,
    vocabulary_loss_of_logits,
)
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.errors import UserError

N, V, C = 6, 11, 4
DECISIONS = 3  # and one of padding


def soft_labels(position_K, weight_K, child_K, token_KxC, log_p_cf_KxC):
    absent_KxC = log_p_cf_KxC == -np.inf
    return SoftLabels(position_K, weight_K, child_K, token_KxC, absent_KxC, log_p_cf_KxC)


def random_case(seed):
    """Decisions (and one of padding) with 2 to 4 children among six positions (one is padding)."""
    rng = np.random.default_rng(seed)
    logits_NxV = rng.normal(0, 3, (N, V)).astype(np.float32)
    position_K = np.array([0, 2, 3, 0], np.int32)
    child_token_KxC = np.stack([rng.choice(V, C, replace=False) for _ in position_K])
    children_K = np.array([4, 2, 3, 4])
    scores_KxC = np.where(np.arange(C) < children_K[:, None], rng.normal(0, 2, (4, C)), -np.inf)
    log_p_cf_KxC = np.array(jax.nn.log_softmax(scores_KxC), np.float32)
    label_child_K = np.array([3, 1, 0, 0], np.int32)
    label_N = rng.integers(0, V, N).astype(np.int32)
    real = np.arange(DECISIONS)
    label_N[position_K[real]] = child_token_KxC[real, label_child_K[real]]
    weight_N = np.array([1, 1, 0.5, 2, 1, 0], np.float32)
    weight_K = np.array([1, 0.5, 2, 0], np.float32)
    labels = soft_labels(position_K, weight_K, label_child_K, child_token_KxC, log_p_cf_KxC)
    return jax.tree.map(jnp.asarray, (logits_NxV, label_N, weight_N, labels))


def dense_loss(logits_NxV, label_N, weight_N, labels, objective):
    """The definition (docs/method.md) over dense [N, V] soft labels and allowed sets."""
    alpha, softmax = objective.alpha, objective.softmax
    cf_NxV = jax.nn.one_hot(label_N, V)
    allowed_NxV = cf_NxV > 0 if softmax == "children" else jnp.ones((N, V), bool)
    for k in range(DECISIONS):
        p = jnp.exp(labels.log_p_cf[k])
        row = jnp.zeros(V).at[labels.token[k]].add(p)
        cf_NxV = cf_NxV.at[labels.position[k]].set(row)
        if softmax == "children":
            is_child = ~labels.absent[k]
            row = jnp.zeros(V, bool).at[labels.token[k]].max(is_child)
            allowed_NxV = allowed_NxV.at[labels.position[k]].set(row)
    y_NxV = (1 - alpha) * jax.nn.one_hot(label_N, V) + alpha * cf_NxV
    log_p_NxV = jax.nn.log_softmax(jnp.where(allowed_NxV, logits_NxV / objective.tau, -1e30))
    if objective.form == "cross_entropy":
        loss_N = -jnp.sum(jnp.where(allowed_NxV, y_NxV * log_p_NxV, 0.0), axis=1)
    else:
        loss_N = -jnp.log(jnp.sum(jnp.where(allowed_NxV, y_NxV * jnp.exp(log_p_NxV), 0.0), axis=1))
    return jnp.sum(loss_N * weight_N)


def sparse_loss(logits_NxV, label_N, weight_N, labels, objective):
    if objective.softmax == "children":
        return children_loss_of_logits(logits_NxV, labels, objective)[0]
    return vocabulary_loss_of_logits(logits_NxV, label_N, weight_N, labels, objective)[0]


dense_gradient, sparse_gradient = (
    jax.jit(jax.value_and_grad(loss)) for loss in (dense_loss, sparse_loss)
)


class SoftNTPTest(parameterized.TestCase):
    @parameterized.product(
        form=["log_expectation", "cross_entropy"],
        softmax=["vocabulary", "children"],
        alpha=[0.0, 0.3, 1.0],
        tau=[1.0, 4.5],
    )
    def test_value_and_gradient_equal_the_dense_definition(self, form, softmax, alpha, tau):
        logits_NxV, *rest = random_case(seed=int(alpha * 10))
        objective = Objective(alpha, 1.0, tau, form, softmax)
        dense = dense_gradient(logits_NxV, *rest, objective)
        sparse = sparse_gradient(logits_NxV, *rest, objective)
        np.testing.assert_allclose(sparse[0], dense[0], rtol=1e-5)
        np.testing.assert_allclose(sparse[1], dense[1], atol=2e-6)

    @parameterized.product(
        softmax=["vocabulary", "children"], form=["log_expectation", "cross_entropy"]
    )
    def test_gradient_equals_finite_differences(self, softmax, form):
        logits_NxV, *rest = random_case(seed=7)
        loss = jax.jit(lambda z: sparse_loss(z, *rest, Objective(0.4, 1.0, 2.0, form, softmax)))
        gradient = jax.grad(loss)(logits_NxV)
        direction = jnp.asarray(np.random.default_rng(1).normal(size=(N, V)), jnp.float32)
        step = 1e-2
        slope = (loss(logits_NxV + step * direction) - loss(logits_NxV - step * direction)) / (
            2 * step
        )
        np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=2e-3)


def many_decisions(seed, positions=37):
    """A decision at about every third position, in random order, and padding."""
    rng = np.random.default_rng(seed)
    position_K = rng.permutation(positions)[: positions // 3]
    position_K = np.concatenate([position_K, np.zeros(5, int)])  # padding points at position 0
    weight_K = (np.arange(position_K.size) < position_K.size - 5).astype(np.float32)
    child_token_KxC = np.stack([rng.choice(V, C, replace=False) for _ in position_K])
    log_p_cf_KxC = np.array(jax.nn.log_softmax(rng.normal(size=(position_K.size, C))))
    log_p_cf_KxC[::3, 2:] = -np.inf
    label_child_K = rng.integers(0, 2, position_K.size)
    label_N = rng.integers(0, V, positions)
    real = weight_K > 0
    label_N[position_K[real]] = child_token_KxC[np.arange(position_K.size), label_child_K][real]
    # A decision at a position without weight has none either.
    weight_K[position_K >= positions - 2] = 0
    labels = soft_labels(position_K, weight_K, label_child_K, child_token_KxC, log_p_cf_KxC)
    hidden_NxD = rng.normal(size=(positions, 5)).astype(np.float32)
    head_DxV = rng.normal(size=(5, V)).astype(np.float32)
    weight_N = (np.arange(positions) < positions - 2).astype(np.float32)
    return jax.tree.map(jnp.asarray, (hidden_NxD, head_DxV, label_N, weight_N, labels))


@pytest.mark.parametrize("form", ["log_expectation", "cross_entropy"])
@pytest.mark.parametrize("softmax", ["vocabulary", "children"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_of_logits_change_neither_loss_nor_gradient(form, softmax, chunk):
    hidden_NxD, head_DxV, label_N, weight_N, labels = many_decisions(chunk)
    objective = Objective(0.3, 1.0, 1.7, form, softmax)

    def loss(hidden_NxD, head_DxV, chunk):
        def head(hidden_nxD):
            return hidden_nxD @ head_DxV

        if softmax == "children":
            states = hidden_NxD[labels.position]
            sums = children_loss(head, states, labels, objective, chunk=chunk)
        else:
            sums = vocabulary_loss(
                head, hidden_NxD, label_N, weight_N, labels, objective, chunk=chunk
            )
        return sums[0] + 2.0 * sums[1], sums

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    chunks = run.lower(hidden_NxD, head_DxV, chunk).compile()
    whole, in_chunks = run(hidden_NxD, head_DxV, 1000), chunks(hidden_NxD, head_DxV)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(in_chunks), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert not re.search(rf"f32\[(\d+,)*{len(label_N)},{V}\]", chunks.as_text())


def test_alpha_zero_is_optax_cross_entropy():
    logits_NxV, label_N, weight_N, labels = random_case(seed=3)
    plain_N = optax.softmax_cross_entropy_with_integer_labels(logits_NxV, label_N)
    for form in ("log_expectation", "cross_entropy"):
        total, nll = vocabulary_loss_of_logits(
            logits_NxV, label_N, weight_N, labels, Objective(0.0, form=form)
        )
        np.testing.assert_allclose(total, jnp.sum(plain_N * weight_N), rtol=1e-6)
        np.testing.assert_allclose(nll, total, rtol=1e-6)


def test_a_hopeless_target_keeps_a_finite_loss():
    logits_NxV, label_N, weight_N, labels = random_case(seed=5)
    p = jnp.where(labels.absent, -jnp.inf, -200.0)
    labels = labels._replace(log_p_cf=p.at[:, 0].set(0.0))
    for alpha in (0.0, 1.0):
        value, gradient = jax.value_and_grad(
            lambda z, alpha=alpha: vocabulary_loss_of_logits(
                1e3 * z, label_N, weight_N, labels, Objective(alpha)
            )[0]
        )(logits_NxV)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.5),
        ("alpha", -0.1),
        ("beta", 0.0),
        ("tau", -1.0),
        ("form", "x"),
        ("softmax", "y"),
    ],
)
def test_objective_fields_out_of_range_are_named(field, value):
    good = {"alpha": 0.1, "beta": 1.0, "tau": 1.0, "form": "cross_entropy", "softmax": "children"}
    Objective(**good).check()
    with pytest.raises(UserError, match=f"objective.{field} is"):
        Objective(**(good | {field: value})).check()


def test_a_child_that_the_cf_model_rules_out_is_still_a_child():
    """Its logit is in the softmax over the children, also where it is the label."""
    logits_NxV, _, _, labels = random_case(seed=9)
    first = labels.log_p_cf.at[0, labels.child[0]].set(-jnp.inf)
    ruled_out = labels._replace(log_p_cf=first)
    for alpha in (0.0, 0.5):
        objective = Objective(alpha, softmax="children")
        total, nll = children_loss_of_logits(logits_NxV, ruled_out, objective)
        _, same_nll = children_loss_of_logits(logits_NxV, labels, objective)
        assert jnp.isfinite(total)
        np.testing.assert_array_equal(nll, same_nll)


LOWEST, HIGHEST = np.finfo(np.float32).min, np.finfo(np.float32).max


@pytest.mark.parametrize("form", ["log_expectation", "cross_entropy"])
@pytest.mark.parametrize("softmax", ["vocabulary", "children"])
@pytest.mark.parametrize(
    "cf_logits_I",
    [
        [LOWEST, 0.0, 1.0, LOWEST, 2.0],  # all that is below the child [1, 2]
        [LOWEST] * 5,
        [HIGHEST, LOWEST, HIGHEST, 0.0, LOWEST],
    ],
)
def test_whatever_finite_cf_logits_come_in_the_loss_is_bounded_below(form, softmax, cf_logits_I):
    """An item that the CF model blocks may be the target, and beta may make its logit overflow."""
    words = [[1, 2], [1, 3], [4], [1, 2], [1, 3, 4]]
    trie = ItemTrie.build([[*word, 0] for word in words]).compress()
    label_BxT = np.array([[*word, 0, 0, 0][:4] for word in words], np.int32)
    weight_BxT = (np.arange(4) < np.array([[len(word) + 1] for word in words])).astype(np.float32)
    decisions = title_decisions(trie).pad(np.arange(len(words)))
    targets = Targets.of_titles(label_BxT, weight_BxT, decisions)
    cf_BxPxI = jnp.tile(jnp.array(cf_logits_I), (len(words), 1, 1))
    z_BxTxV = np.random.default_rng(0).normal(0, 2, (*label_BxT.shape, 6)).astype(np.float32)
    on_device, objective = DeviceTrie.of(trie), Objective(0.5, 0.5, form=form, softmax=softmax)

    @jax.jit
    @jax.value_and_grad
    def loss_of(lift):
        """The loss if every label's logit is raised so much."""
        z = z_BxTxV + lift * jax.nn.one_hot(label_BxT, 6)
        return tca_loss(z, of_logits, targets, cf_BxPxI, DENSE, on_device, objective).total

    for lift in (0.0, 5.0, 50.0, 1e4):
        loss, slope = loss_of(lift)
        assert 0.0 <= loss < np.inf
        assert np.isfinite(slope)
    assert slope >= 0.0  # where it is certain of the label, nothing is paid for raising it
