"""Trie, projection and losses against the numbers of the published PyTorch code.

tests/goldens/make_published_golden.py says what these numbers are.

Axis letters: B rows, I items, N tokens of the rows' target titles (the positions), row after row,
M positions with a loss, K decisions among the positions, C children, E pairs of a position and a
child, V vocabulary, G groups of positions, S settings.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tca4rec_jax.core.collaborative_tokenizer import (
    child_log_probs,
    node_log_mass,
)
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.losses import SoftLabels, children_loss_of_logits, vocabulary_loss_of_logits
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged

END = 2
VOCABULARY = 49152


class Positions(NamedTuple):
    """The positions of all rows, and our projection at the decisions among them."""

    row_N: np.ndarray
    label_N: np.ndarray
    trained_N: np.ndarray  # bool: the published code gives a title's last token no loss
    labels: SoftLabels  # weights are 1


@jax.jit
def projection(logits_BxI, row_K, node_K, trie):
    """Tokens and log p_cf [K, C] of the children of each decision's node; absent ones."""
    child_KxC, is_child_KxC = trie.children(node_K)
    log_p_KxC = child_log_probs(node_log_mass(logits_BxI, trie), row_K, node_K, trie)
    return trie.token[child_KxC], ~is_child_KxC, log_p_KxC


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "goldens" / "published_tca.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def positions(golden):
    titles = Ragged.from_lengths(golden["title_tokens"], golden["title_lengths_I"].astype(int))
    ended = np.insert(titles.values.astype(np.int32), titles.offsets[1:], END)
    trie = ItemTrie.build(Ragged.from_lengths(ended, titles.lengths + 1)).compress()
    on_device = DeviceTrie.of(trie)

    target_B = golden["target_B"]
    length_B = titles.lengths[target_B]
    first_B = np.cumsum(length_B) - length_B
    row_N = np.repeat(np.arange(target_B.size), length_B)
    padded = title_decisions(trie).pad(target_B)
    # A title that begins another one also decides for its end token, which has no position here.
    row_K, column_K = np.nonzero((padded.weight > 0) & (padded.position < length_B[:, None]))

    node_K = padded.node[row_K, column_K]
    projected = projection(golden["cf_logits_BxI"], row_K, node_K, on_device)
    labels = SoftLabels(
        first_B[row_K] + padded.position[row_K, column_K],
        np.ones(row_K.size, np.float32),
        padded.child[row_K, column_K],
        *projected,
    )
    return Positions(
        row_N=row_N,
        label_N=np.concatenate([titles[item] for item in target_B]).astype(np.int32),
        trained_N=np.arange(row_N.size) != (first_B + length_B - 1)[row_N],
        labels=jax.tree.map(jnp.asarray, labels),
    )


@pytest.fixture(scope="module")
def logits_NxV(golden, positions):
    logits = []
    for row, seed in enumerate(golden["seed_B"]):
        # The legacy generator, because the published numbers were computed with it.
        random = np.random.RandomState(seed)
        normal = random.standard_normal((np.sum(positions.row_N == row), VOCABULARY))
        logits.append((3.0 * normal).astype(np.float32))
        np.testing.assert_array_equal(logits[row][0, :4], golden["logits_first_Bx4"][row])
        total = logits[row].sum(dtype=np.float64)
        np.testing.assert_allclose(total, golden["logits_sum_B"][row], rtol=1e-9)
    return jnp.asarray(np.concatenate(logits))


def sparse_rows(positions):
    """Tokens and p_cf [N, C] of the children of every position, and where there are any.

    A position that is no decision lies inside an edge of the compressed trie: its only child is
    the title's next token.
    """
    labels = positions.labels
    position_K = np.asarray(labels.position)
    token_NxC = np.zeros((positions.label_N.size, labels.token.shape[1]), int)
    p_cf_NxC = np.zeros(token_NxC.shape, np.float32)
    is_child_NxC = np.zeros(token_NxC.shape, bool)
    token_NxC[:, 0], p_cf_NxC[:, 0], is_child_NxC[:, 0] = positions.label_N, 1.0, True
    token_NxC[position_K] = labels.token
    p_cf_NxC[position_K] = np.exp(labels.log_p_cf)
    is_child_NxC[position_K] = ~labels.absent
    return token_NxC, p_cf_NxC, is_child_NxC


def test_distributions(golden, positions):
    token_NxC, p_cf_NxC, is_child_NxC = sparse_rows(positions)
    np.testing.assert_array_equal(is_child_NxC.sum(axis=1), golden["children_N"])
    np.testing.assert_array_equal(token_NxC[is_child_NxC], golden["token_E"])
    np.testing.assert_allclose(p_cf_NxC[is_child_NxC], golden["p_cf_E"], rtol=1e-5)


def total_loss(logits_NxV, weight_N, positions, alpha, tau, over_children):
    """Our loss, summed over the positions with a weight."""
    labels, objective = positions.labels, Objective(alpha, 1.0, tau, "log_expectation")
    labels = labels._replace(weight=weight_N[labels.position])
    if over_children:
        return children_loss_of_logits(logits_NxV, labels, objective)[0]
    label_N = positions.label_N
    return vocabulary_loss_of_logits(logits_NxV, label_N, weight_N, labels, objective)[0]


@partial(jax.jit, static_argnames="over_children")
def group_losses(logits_NxV, weight_GxN, positions, alpha, tau, over_children):
    """Mean loss [G] of groups of positions, given by weights of 0 and 1."""
    total_G = jax.vmap(total_loss, (None, 0, None, None, None, None))(
        logits_NxV, weight_GxN, positions, alpha, tau, over_children
    )
    return total_G / weight_GxN.sum(axis=1)


@jax.jit
def logits_gradient(logits_NxV, weight_N, positions, alpha, tau):
    """Gradient [N, V] of the loss over the children."""
    return jax.grad(total_loss)(logits_NxV, weight_N, positions, alpha, tau, over_children=True)


@pytest.mark.parametrize("setting", range(5))
def test_losses_of_positions_rows_and_the_batch(golden, positions, logits_NxV, setting):
    alpha, tau, over_children = golden["settings_Sx3"][setting]
    published = {
        "positions": golden["loss_SxM"][setting],
        "rows": golden["loss_BxS"][:, setting],
        "batch": golden["loss_S"][setting, None],
    }
    row_BxN = np.arange(golden["seed_B"].size)[:, None] == positions.row_N
    masks = {
        "positions": np.eye(positions.row_N.size)[positions.trained_N],
        "rows": row_BxN * positions.trained_N,
        "batch": positions.trained_N[None, :],
    }
    weight_GxN = np.concatenate(list(masks.values())).astype(np.float32)
    loss_G = group_losses(logits_NxV, weight_GxN, positions, alpha, tau, bool(over_children))
    ends = np.cumsum([len(mask) for mask in masks.values()])
    for name, ours in zip(masks, np.split(loss_G, ends[:-1]), strict=True):
        # Where the next token is forced, the published loss over the children is 0 up to rounding.
        np.testing.assert_allclose(ours, published[name], rtol=1e-5, atol=3e-7, err_msg=name)


@pytest.mark.parametrize("setting", [2, 3])
def test_gradients_of_the_logits(golden, positions, logits_NxV, setting):
    alpha, tau, over_children = golden["settings_Sx3"][setting]
    assert over_children
    trained_N = positions.trained_N.astype(np.float32)
    # Each row is a batch of its own: the mean over its positions.
    weight_N = trained_N / np.bincount(positions.row_N, trained_N)[positions.row_N]
    gradient_NxV = np.asarray(
        logits_gradient(logits_NxV, weight_N.astype(np.float32), positions, alpha, tau)
    )
    token_NxC, _, is_child_NxC = sparse_rows(positions)
    gradient_E = np.take_along_axis(gradient_NxV, token_NxC, axis=1)[is_child_NxC]
    published_E = golden[f"gradient_{setting}_E"]
    largest = np.abs(published_E).max()
    np.testing.assert_allclose(gradient_E, published_E, rtol=0, atol=1e-5 * largest)
    # Tokens that are no child have no gradient.
    assert np.count_nonzero(gradient_NxV) == np.count_nonzero(gradient_E)
