"""MSL's adaptive temperature against float64 NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.core.decisions import Targets, title_decisions
from tca4rec_jax.core.losses import Moments, children_loss, of_logits, tca_loss
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.temperature import adapted, check_eta

WORDS = ([1, 2, 0], [1, 3, 0], [4, 0], [5, 2, 0], [6, 1, 0], [7, 0], [8, 0])
FIRST = sorted({word[0] for word in WORDS})
BOUNDS = (1.5, 5.0)


def oracle(first_logits, targets, eta):
    """tau of a batch: logits of all first tokens [titles, C], and those of the targets."""
    d = np.mean(targets) - np.mean(first_logits)
    c = np.log(eta * len(FIRST))
    return (d + np.sqrt(max(d**2 - 2 * c * np.var(first_logits), 0))) / (2 * c)


@pytest.mark.parametrize(("scale", "lift"), [(3.0, 0.0), (3.0, 30.0), (0.5, 9.0), (0.5, -9.0)])
def test_the_tau_of_a_batch_equals_the_formula(scale, lift):
    rng = np.random.default_rng(int(10 * scale))
    trie, titles = ItemTrie.build(WORDS).compress(), rng.integers(0, len(WORDS), 12)
    label_BxT = np.array([[*WORDS[title], 0, 0][:3] for title in titles], np.int32)
    weight_BxT = (np.arange(3) < np.array([[len(WORDS[title])] for title in titles])).astype("f4")
    z_BxTxV = rng.normal(4.0, scale, (12, 3, 9)).astype(np.float32)
    z_BxTxV[np.arange(12), 0, label_BxT[:, 0]] += lift
    targets = Targets.of_titles(label_BxT, weight_BxT, title_decisions(trie).pad(titles))
    objective = Objective(0.3, softmax="children", temperature="adaptive", eta=0.9)
    cf_BxPxI = rng.normal(size=(12, 1, len(WORDS))).astype(np.float32)
    args = z_BxTxV, of_logits, targets, cf_BxPxI, DENSE, DeviceTrie.of(trie)
    moments = jax.jit(tca_loss, static_argnums=1)(*args, objective).moments
    first_logits = z_BxTxV[:, 0, FIRST].astype(np.float64)
    expected = oracle(first_logits, z_BxTxV[np.arange(12), 0, label_BxT[:, 0]], 0.9)
    whole = dataclasses.replace(objective, tau_bounds=(-99.0, 99.0), tau_weight=1.0)
    tau = adapted(2.0, moments, len(FIRST), whole)
    np.testing.assert_allclose(tau, expected, rtol=1e-5, atol=1e-6)
    running = adapted(2.0, moments, len(FIRST), objective)
    np.testing.assert_allclose(running, 1.9 + 0.05 * np.clip(expected, *BOUNDS), rtol=1e-6)


def test_moments_of_chunks_are_those_of_all():
    rng = np.random.default_rng(0)
    trie = ItemTrie.build(WORDS).compress()
    z_NxV = rng.normal(size=(20, 9)).astype(np.float32)
    decisions = title_decisions(trie).pad(rng.integers(0, len(WORDS), 10))
    targets = Targets.of_titles(*np.zeros((2, 10, 2), np.int32), decisions)
    seen = {}

    def keep(head, states, labels, objective):
        seen["labels"], seen["states"] = labels, states
        return children_loss(head, states, labels, objective)

    objective = Objective(0.0, softmax="children", temperature="adaptive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tca4rec_jax.core.losses.children_loss", keep)
        args = z_NxV.reshape(10, 2, 9), of_logits, targets, None, None, DeviceTrie.of(trie)
        whole = tca_loss(*args, objective).moments
    head = of_logits(DeviceTrie.of(trie).choice)
    *_, moments = children_loss(head, seen["states"], seen["labels"], objective, chunk=8)
    np.testing.assert_allclose(moments, whole, rtol=1e-6)


def test_a_batch_without_titles_leaves_tau_alone():
    nothing = Moments(*np.zeros(5, np.float32))
    assert adapted(2.5, nothing, 6, Objective(eta=0.9, tau_weight=0.5)) == 2.5


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match=r"objective.eta is 0.1: expected more than 1 / 6"):
        check_eta(0.1, 6)
    for field in ({"temperature": "adaptive"}, {"mean_over": "decisions"}):
        Objective(softmax="children", **field).check()
        with pytest.raises(UserError, match=f"objective.{[*field][0]} is .*softmax=children"):
            Objective(**field)


@pytest.mark.parametrize("mean_over", ["positions", "decisions"])
def test_the_published_loss_is_scaled_by_tau_and_averaged_over_decisions(mean_over):
    """MSL's own: -z_target + tau log sum exp(z / tau), where there are several children."""
    trie = ItemTrie.build(WORDS).compress()
    label_BxT, weight_BxT = np.array([[1, 3, 0]], np.int32), np.ones((1, 3), np.float32)
    z_BxTxV = np.random.default_rng(1).normal(0, 2, (1, 3, 9)).astype(np.float32)
    targets = Targets.of_titles(label_BxT, weight_BxT, title_decisions(trie).pad(np.array([1])))
    objective = Objective(0.0, 1.0, 1.7, softmax="children", mean_over=mean_over, scale_by_tau=True)
    loss = tca_loss(z_BxTxV, of_logits, targets, None, None, DeviceTrie.of(trie), objective)
    parts = [(z_BxTxV[0, 0], FIRST, 1), (z_BxTxV[0, 1], [2, 3], 3)]
    total = sum(1.7 * np.log(np.exp(z[a] / 1.7).sum()) - z[target] for z, a, target in parts)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert loss.positions == {"positions": 3, "decisions": 2}[mean_over]
