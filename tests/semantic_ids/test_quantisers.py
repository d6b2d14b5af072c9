"""k-means, RQ-k-means, RQ-VAE, and assignments of even sizes against exact ones."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment

from tca4rec_jax.semantic_ids.assignment import even_codes, sinkhorn
from tca4rec_jax.semantic_ids.k_means import k_means, residual_k_means, squared_distances
from tca4rec_jax.semantic_ids.rq_vae import (
    RQVAE,
    Items,
    RQVAEConfig,
    diversity_loss,
    fit_rq_vae,
    loss_of,
    quantise,
)


def _points(seed, count, width=5):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def _least_cost(cost_nxK):
    """The least cost of sizes n // K or one more: exact, as an assignment to places of codes."""
    num_items, num_codes = cost_nxK.shape
    least, more = divmod(num_items, num_codes)
    places = np.repeat(cost_nxK.astype(np.float64), least + 1, axis=1)
    nobody = np.full((num_codes - more, places.shape[1]), 1e6)
    nobody[:, least :: least + 1] = 0  # only the place beyond n // K may stay empty
    return sum(np.concatenate([places, nobody])[linear_sum_assignment([*places, *nobody])])


@pytest.mark.parametrize(("count", "codes"), [(60, 7), (64, 8), (5, 8), (1, 3), (9, 1)])
def test_an_even_assignment_has_sizes_within_one_and_nearly_the_least_cost(count, codes):
    cost_nxK = np.asarray(squared_distances(_points(0, count), _points(1, codes)))
    code_n = np.asarray(even_codes(cost_nxK))
    sizes = np.bincount(code_n, minlength=codes)
    assert sizes.size == codes
    assert set(sizes) <= {count // codes, -(-count // codes)}
    cost = cost_nxK[np.arange(count), code_n].sum()
    assert cost <= 1.05 * _least_cost(cost_nxK)


def test_sizes_are_even_when_everything_is_equal_or_one_code_is_best_for_all():
    for cost_nxK in (np.zeros((50, 6)), np.repeat([[0.0, 1, 2, 3, 4, 500]], 50, axis=0)):
        assert set(np.bincount(even_codes(cost_nxK.astype(np.float32)))) == {8, 9}


def test_sinkhorn_is_the_plain_algorithm_for_each_group_alone():
    cost_nxK = np.asarray(squared_distances(_points(0, 9), _points(1, 4)))
    group_n = np.array([0, 0, 0, 1, 1, 2, 9, 9, 9], np.int32)  # the last three are padding
    log_plan_nxK = np.asarray(sinkhorn(cost_nxK, group_n, 3, epsilon=0.1, rounds=50))
    for group in range(3):
        cost = cost_nxK[group_n == group].astype(np.float64)
        middle, half = (cost.max() + cost.min()) / 2, (cost.max() - cost.min()) / 2 + 1e-5
        plan = np.exp(-(cost - middle) / half / 0.1)
        for _ in range(50):
            plan /= plan.sum(axis=1, keepdims=True)
            plan /= plan.sum(axis=0, keepdims=True)
        np.testing.assert_allclose(np.exp(log_plan_nxK[group_n == group]), plan, rtol=1e-3)


def test_k_means_settles_at_nearest_codes_and_means():
    points_nxE = _points(0, 200)
    centroid_KxE, code_n = map(np.asarray, k_means(points_nxE, jax.random.key(0), 9))
    distance_nxK = np.square(points_nxE[:, None] - centroid_KxE).sum(axis=2)
    np.testing.assert_array_equal(code_n, distance_nxK.argmin(axis=1))
    for code in range(9):
        np.testing.assert_allclose(
            centroid_KxE[code], points_nxE[code_n == code].mean(axis=0), atol=1e-5
        )


def test_k_means_finds_clusters_that_lie_apart_and_uses_every_code():
    centres_KxE = 100 * _points(1, 6)
    points_nxE = np.repeat(centres_KxE, 10, axis=0) + _points(2, 60)
    _, code_n = k_means(points_nxE, jax.random.key(0), 6)
    assert len(set(map(tuple, np.asarray(code_n).reshape(6, 10).tolist()))) == 6
    assert all(len(set(row)) == 1 for row in np.asarray(code_n).reshape(6, 10).tolist())


@pytest.mark.parametrize("balanced", [False, True])
def test_residual_k_means_adds_up_and_gets_closer(balanced):
    points_IxE = _points(0, 100)
    found = residual_k_means(points_IxE, (6, 5, 4), balanced=balanced, seed=3)
    assert found.codes_IxL.shape == (100, 3)
    assert all(found.codes_IxL.max(axis=0) < (6, 5, 4))
    assert 1 > found.left[0] > found.left[1] > found.left[2] > 0
    rest_IxE = found.last_IxE - found.last_KxE[found.codes_IxL[:, -1]]
    whole = np.square(points_IxE - points_IxE.mean(axis=0)).mean()
    assert np.square(rest_IxE).mean() / whole == pytest.approx(found.left[-1], rel=1e-4)
    again = residual_k_means(points_IxE, (6, 5, 4), balanced=balanced, seed=3)
    np.testing.assert_array_equal(found.codes_IxL, again.codes_IxL)
    if balanced:
        for level, codes in enumerate((6, 5, 4)):
            sizes = np.bincount(found.codes_IxL[:, level], minlength=codes)
            assert set(sizes) <= {100 // codes, -(-100 // codes)}


def test_k_means_of_fewer_distinct_points_than_codes():
    found = residual_k_means(np.repeat(_points(0, 3), 2, axis=0), (8, 8), balanced=False, seed=0)
    assert found.left[0] == pytest.approx(0, abs=1e-9)
    assert len(np.unique(found.codes_IxL, axis=0)) == 3


CONFIG = RQVAEConfig(units=(16,), width=4, epochs=40, batch_size=20)


def _model(codes=(5, 4), cf=0):
    model = RQVAE(CONFIG, codes, 6, cf, rngs=nnx.Rngs(0))
    for number, book in enumerate(model.codebooks):
        book[...] = jnp.asarray(_points(number, len(book[...]), CONFIG.width))
    return model


def test_the_codes_are_the_nearest_of_the_residuals():
    model, latent_BxW = _model(), jnp.asarray(_points(9, 30, CONFIG.width))
    first, second = quantise(model, latent_BxW, even_last=False)
    residual_BxW = np.asarray(latent_BxW)
    for level, book in zip((first, second), model.codebooks, strict=True):
        distance_BxK = np.square(residual_BxW[:, None] - np.asarray(book[...])).sum(axis=2)
        np.testing.assert_array_equal(level.code_B, distance_BxK.argmin(axis=1))
        residual_BxW = residual_BxW - np.asarray(book[...])[level.code_B]
    even = quantise(model, latent_BxW, even_last=True)[1]
    assert np.bincount(even.code_B).max() < np.bincount(second.code_B).max()


def test_the_loss_is_the_sum_of_its_parts():
    model, embedding_BxE, cf_BxC = _model(cf=3), _points(8, 20, 6), _points(7, 20, 3)
    levels = quantise(model, model.encode(embedding_BxE), even_last=True)
    total_BxW = np.sum([one.chosen_BxW for one in levels], axis=0)
    reconstruction = np.square(np.asarray(model.decode(total_BxW)) - embedding_BxE).mean()
    distances = [np.square(one.residual_BxW - one.chosen_BxW).mean() for one in levels]
    logits_BxB = np.asarray(model.to_cf(total_BxW)) @ cf_BxC.T
    contrast = -np.diag(jax.nn.log_softmax(logits_BxB)).mean()
    config = RQVAEConfig(units=(16,), width=4, commitment=0.5, cf_weight=0.1)
    batch = Items(jnp.asarray(embedding_BxE), jnp.asarray(cf_BxC))
    loss, part = loss_of(model, config, batch, (), jax.random.key(0))
    assert part == pytest.approx(reconstruction, rel=1e-5)
    expected = reconstruction + 1.5 * np.mean(distances) + 0.1 * contrast
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_gradients_reach_encoder_and_codebooks_where_they_should():
    model = _model()
    batch = Items(jnp.asarray(_points(8, 20, 6)), None)

    def gradients(commitment):
        graph, params = nnx.split(model)
        config = RQVAEConfig(units=(16,), width=4, commitment=commitment)
        return jax.grad(
            lambda params: loss_of(nnx.merge(graph, params), config, batch, (), jax.random.key(0))[
                0
            ]
        )(params)

    without, committed = gradients(0.0), gradients(0.25)
    for name, differs in (("encoder", True), ("codebooks", False), ("decoder", False)):
        pairs = zip(*map(jax.tree.leaves, (without[name], committed[name])), strict=True)
        assert any(not np.allclose(*pair, atol=1e-7) for pair in pairs) == differs, name
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(committed["codebooks"]))


def test_the_diversity_loss_contrasts_a_code_with_one_of_its_group():
    model = _model(codes=(5,))
    (level,) = quantise(model, jnp.asarray(_points(9, 12, CONFIG.width)), even_last=False)
    book_KxW = np.asarray(model.codebooks[0][...])
    group_K = np.array([0, 1, 0, 1, 1], np.int32)
    options = []
    for code in np.asarray(level.code_B):
        similarity_K = np.where(np.arange(5) == code, -np.inf, book_KxW @ book_KxW[code])
        like = [k for k in range(5) if group_K[k] == group_K[code] and k != code]
        options.append([float(-jax.nn.log_softmax(similarity_K)[k]) for k in like])
    for seed in range(5):
        loss = diversity_loss(level, book_KxW, group_K, jax.random.key(seed))
        lowest, highest = (np.mean([pick(one) for one in options]) for pick in (min, max))
        assert lowest - 1e-5 <= loss <= highest + 1e-5
    only_like = [one[0] for one in options if len(one) == 1]
    assert only_like, "a group of two leaves no choice"


def test_an_rq_vae_learns_codes_that_tell_items_apart():
    points_IxE = np.repeat(_points(1, 12, 6), 5, axis=0) + 0.05 * _points(2, 60, 6)
    cf_IxC = _points(3, 60, 3)
    config = RQVAEConfig(
        units=(16,), width=4, epochs=60, batch_size=30, cf_weight=0.05, diversity_weight=1e-4
    )
    found = fit_rq_vae(points_IxE, (6, 6), config, seed=0, cf_IxC=cf_IxC)
    again = fit_rq_vae(points_IxE, (6, 6), config, seed=0, cf_IxC=cf_IxC)
    np.testing.assert_array_equal(found.codes_IxL, again.codes_IxL)
    assert found.left[-1] < 0.6
    assert len(np.unique(found.codes_IxL, axis=0)) >= 6
    nearest = np.asarray(squared_distances(found.last_IxE, found.last_KxE)).argmin(axis=1)
    np.testing.assert_array_equal(found.codes_IxL[:, -1], nearest)


def test_the_cf_term_brings_items_together_that_the_cf_model_finds_alike():
    """With random embeddings only the CF vectors say which items are alike."""
    points_IxE, kinds = _points(1, 60, 6), np.arange(60) % 3
    cf_IxC = 3 * np.eye(3, dtype=np.float32)[kinds]

    def agreement(weight):
        config = RQVAEConfig((16,), 4, epochs=100, batch_size=20, learning_rate=0.01)
        config = dataclasses.replace(config, cf_weight=weight)
        found = fit_rq_vae(points_IxE, (3, 4), config, seed=0, cf_IxC=cf_IxC if weight else None)
        first_I = found.codes_IxL[:, 0]
        pairs = [(a, b) for a, b in itertools.combinations(range(60), 2) if kinds[a] == kinds[b]]
        return np.mean([first_I[a] == first_I[b] for a, b in pairs])

    assert agreement(1.0) > agreement(0.0) + 0.1
