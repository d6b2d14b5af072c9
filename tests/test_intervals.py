"""Intervals and tests of means over rows against loops that draw, or exchange, users."""

import itertools

import numpy as np
import pytest

from tca4rec_jax.intervals import (
    Spread,
    bootstrap_intervals,
    holm,
    randomisation_test,
    seed_spread,
)


def loop_over_users(values_R, user_R, resamples, rng):
    of_user = [values_R[user_R == user] for user in np.unique(user_R)]
    drawn = (rng.integers(0, len(of_user), len(of_user)) for _ in range(resamples))
    means = [np.concatenate([of_user[user] for user in users]).mean() for users in drawn]
    return np.quantile(means, [0.025, 0.975])


@pytest.mark.parametrize("rows_of_a_user", [1, 4])
def test_intervals_agree_with_a_loop_that_draws_users(rows_of_a_user):
    rng = np.random.default_rng(1)
    user_R = rng.permutation(np.arange(240) // rows_of_a_user)
    of_user = rng.normal(size=240)[user_R]  # the rows of a user are alike
    values = {"x": of_user + 0.1 * rng.normal(size=240), "y": np.abs(of_user)}
    found = bootstrap_intervals(values, user_R, seed=3)
    for name, values_R in values.items():
        low, high = loop_over_users(values_R, user_R, 3000, rng)
        assert found[name].mean == pytest.approx(values_R.mean(), rel=1e-12)
        assert found[name][1:] == pytest.approx((low, high), abs=0.08 * (high - low))


def test_where_every_user_has_one_row_rows_are_drawn():
    """To the bit, whatever the users' numbers are: published intervals stay what they are."""
    rng = np.random.default_rng(0)
    values_RxJ, user_R = rng.normal(size=(150, 2)), rng.permutation(1000)[:150]
    draws = np.random.default_rng(7)
    blocks = [draws.multinomial(150, np.full(150, 1 / 150), size=128) for _ in range(2)]
    means_WxJ = np.concatenate([counts_WxR @ values_RxJ / 150 for counts_WxR in blocks])
    low_J, high_J = np.quantile(means_WxJ, [(1 - 0.95) / 2, 1 - (1 - 0.95) / 2], axis=0)
    found = bootstrap_intervals(dict(enumerate(values_RxJ.T)), user_R, seed=7, resamples=256)
    for j in range(2):
        assert found[j] == (values_RxJ.mean(axis=0)[j], low_J[j], high_J[j])


def test_copies_of_every_users_rows_change_nothing():
    values_R, user_R = np.random.default_rng(0).normal(size=60), np.arange(60) // 2
    once, thrice = (
        bootstrap_intervals({"x": np.tile(values_R, n)}, np.tile(user_R, n))["x"] for n in (1, 3)
    )
    assert thrice == pytest.approx(once)


def test_about_95_of_100_intervals_cover_the_true_mean():
    draws_RxJ = np.random.default_rng(0).normal(size=(200, 300))
    columns = dict(enumerate(draws_RxJ.T))
    intervals = bootstrap_intervals(columns, np.arange(200), resamples=500)
    covered = np.mean([i.low <= 0 <= i.high for i in intervals.values()])
    assert 0.90 < covered < 0.985


def test_intervals_are_seeded():
    given = {"x": np.arange(50.0) % 13}, np.arange(50)
    assert bootstrap_intervals(*given, seed=1) == bootstrap_intervals(*given, seed=1)
    assert bootstrap_intervals(*given, seed=1) != bootstrap_intervals(*given, seed=2)


def test_rows_that_are_masked_do_not_count():
    rng = np.random.default_rng(2)
    values_R, user_R, inside_R = rng.normal(size=300), np.arange(300) // 3, rng.random(300) < 0.4
    masked_R = np.ma.masked_array(np.where(inside_R, values_R, np.nan), ~inside_R)
    found = bootstrap_intervals({"slice": masked_R, "all": values_R}, user_R)
    alone = bootstrap_intervals({"slice": values_R[inside_R]}, user_R[inside_R])["slice"]
    assert found["slice"].mean == pytest.approx(alone.mean)
    assert found["slice"] == pytest.approx(alone, abs=0.15 * (alone.high - alone.low))
    assert found["all"] == pytest.approx(bootstrap_intervals({"all": values_R}, user_R)["all"])
    few_R = np.ma.masked_array(values_R, np.arange(300) > 0)  # most draws lack its one user
    assert bootstrap_intervals({"one": few_R}, user_R)["one"] == (values_R[0],) * 3
    with pytest.raises(ValueError, match="none: no row counts"):
        bootstrap_intervals({"none": np.ma.masked_all(300)}, user_R)


def test_bad_values_are_errors():
    two = np.arange(2)
    with pytest.raises(ValueError, match="row 1: x is nan"):
        bootstrap_intervals({"x": np.array([0.0, np.nan])}, two)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_intervals({"x": np.zeros(0)}, two[:0])
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_intervals({"x": np.zeros(2), "y": np.zeros(3)}, two)
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_intervals({"x": np.zeros(3)}, two)
    with pytest.raises(ValueError, match="level"):
        bootstrap_intervals({"x": np.zeros(2)}, two, level=95)


def test_p_values_agree_with_every_choice_of_signs():
    rng = np.random.default_rng(0)
    user_R = np.arange(24) // 3  # 8 users: 256 choices
    differences = {name: rng.normal(shift, 1, 24) for name, shift in (("a", 0.0), ("b", 0.7))}
    differences["none"] = np.zeros(24)
    found = randomisation_test(differences, user_R)
    for name, differences_R in differences.items():
        sum_U = np.bincount(user_R, differences_R)
        signs = np.array(list(itertools.product((-1, 1), repeat=8)))
        as_far = np.abs(signs @ sum_U) >= np.abs(sum_U.sum()) - 1e-9
        assert found[name] == pytest.approx(as_far.mean(), abs=0.015)
    assert found["none"] == 1
    assert found["b"] < 0.1 < found["a"]


def test_without_a_difference_one_p_value_in_twenty_is_below_a_twentieth():
    """Of rows that are alike within users: a test over rows would find far more."""
    rng = np.random.default_rng(0)
    user_R = np.repeat(np.arange(40), 5)
    given = {n: rng.normal(size=40)[user_R] + 0.1 * rng.normal(size=200) for n in range(400)}
    below = np.mean([p < 0.05 for p in randomisation_test(given, user_R, draws=500).values()])
    assert 0.025 < below < 0.08
    of_rows = randomisation_test(given, np.arange(200), draws=500).values()
    assert np.mean([p < 0.05 for p in of_rows]) > 0.2


def test_holm_corrects_for_the_number_of_tests():
    """The example of Holm's procedure in R's p.adjust: p = 0.01, 0.02, 0.03, 0.04, 0.05."""
    p_values = {"e": 0.05, "a": 0.01, "c": 0.03, "b": 0.02, "d": 0.04}
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    expected = {"a": 0.05, "b": 0.08, "c": 0.09, "d": 0.09, "e": 0.09}
    assert adjusted == pytest.approx(expected)
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def made_seeds(rng, seeds, users, *, of_seed, of_user, of_both, models=1, repetitions=300):
    """Differences of models from one baseline [models, S, users, repetitions]; their mean is 0."""
    parts = (of_seed, (seeds, 1)), (of_user, (1, users)), (of_both, (seeds, users))
    made = [
        sum(scale * rng.normal(size=(*shape, repetitions)) for scale, shape in parts) / 2**0.5
        for _ in range(models + 1)
    ]
    return np.stack(made[1:]) - made[0]


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize(("of_seed", "of_user"), [(0.0, 1.0), (0.1, 0.5), (0.5, 1.0)])
def test_whatever_seeds_do_no_more_than_one_test_in_twenty_finds_what_is_not_there(
    models, of_seed, of_user
):
    """And where they matter, tests over users alone find it up to eight times as often."""
    rng, user_R = np.random.default_rng(0), np.arange(200)
    how = {"of_seed": of_seed, "of_user": of_user, "of_both": 1.0, "models": models}
    made = made_seeds(rng, 3, 200, **how, repetitions=900 // models)
    means, spread = {}, {}
    for repetition in range(made.shape[-1]):
        values = {(repetition, model): one for model, one in enumerate(made[..., repetition])}
        spread |= seed_spread(values, user_R)
        means |= {name: one.mean(axis=0) for name, one in values.items()}
    found = np.array([*randomisation_test(means, user_R, spread=spread, draws=1000).values()])
    assert 0.01 < np.mean(found < 0.05) < 0.06
    assert np.mean(found < 0.01) < 0.015
    intervals = bootstrap_intervals(means, user_R, spread=spread, resamples=1000)
    outside = np.mean([not one.low <= 0 <= one.high for one in intervals.values()])
    assert abs(outside - np.mean(found < 0.05)) < 0.02
    if of_seed:
        alone = randomisation_test(means, user_R, draws=500).values()
        assert np.mean([p < 0.05 for p in alone]) > 0.12


def test_models_that_share_a_baseline_show_a_difference_sooner_than_one_alone():
    rng, user_R = np.random.default_rng(0), np.arange(200)
    made = made_seeds(rng, 3, 200, of_seed=0.05, of_user=0.2, of_both=0.2, models=3, repetitions=1)
    values = {model: one + 0.3 for model, one in enumerate(made[..., 0])}
    means = {name: one.mean(axis=0) for name, one in values.items()}
    together = randomisation_test(means, user_R, spread=seed_spread(values, user_R))
    alone = {name: seed_spread({name: one}, user_R)[name] for name, one in values.items()}
    assert max(together.values()) < 0.01
    assert max(together.values()) < max(randomisation_test(means, user_R, spread=alone).values())


def test_the_spread_of_seeds_is_what_an_analysis_of_variance_says():
    rng = np.random.default_rng(0)
    how = {"of_seed": 1.0, "of_user": 1.0, "of_both": 0.5, "models": 2, "repetitions": 1}
    both = made_seeds(rng, 4, 30, **how)[..., 0]
    variances, explained = [], []
    for values_SxR in both:
        grand, mean_S, mean_U = values_SxR.mean(), values_SxR.mean(axis=1), values_SxR.mean(axis=0)
        of_both = sum(
            (values_SxR[s, u] - mean_S[s] - mean_U[u] + grand) ** 2
            for s in range(4)
            for u in range(30)
        ) / (3 * 30)  # its biased mean square: as the bootstrap over users has it
        variances.append(sum((one - grand) ** 2 for one in mean_S) / 3)
        explained.append(of_both / 30)
    found = seed_spread({"a": both[0]}, np.arange(30))["a"]
    assert found == pytest.approx((variances[0] / 4, explained[0] / 4, 3))
    pooled = seed_spread(dict(zip("ab", both, strict=True)), np.arange(30))
    assert pooled["a"] == pooled["b"]
    assert pooled["a"] == pytest.approx((np.mean(variances) / 4, np.mean(explained) / 4, 4))
    twice = np.repeat(both[0], 2, axis=1)  # a user's rows move together
    assert seed_spread({"a": twice}, np.repeat(np.arange(30), 2))["a"] == pytest.approx(found)


def test_one_seed_says_nothing_of_others_and_equal_ones_that_they_agree():
    values_SxR, user_R = np.random.default_rng(0).normal(size=(1, 50)), np.arange(50)
    several = np.random.default_rng(1).normal(size=(3, 50))
    assert seed_spread({"x": values_SxR}, user_R) == {"x": Spread()}
    assert seed_spread({"x": values_SxR, "y": several + [[0], [1], [2]]}, user_R)["x"] == Spread()
    same = np.repeat(values_SxR, 3, axis=0)
    assert seed_spread({"x": same}, user_R)["x"] == pytest.approx((0, 0, 2))
    values, none = {"x": values_SxR[0]}, {"x": Spread()}
    for of in (bootstrap_intervals, randomisation_test):
        assert of(values, user_R) == of(values, user_R, spread=none)


def test_where_seeds_alone_differ_their_mean_has_students_distribution():
    """Of the mean of three numbers about 0: the interval of a t-test."""
    values_SxR, users = np.repeat([[0.1], [0.4], [0.7]], 4, axis=1), np.arange(4)
    spread, values = seed_spread({"x": values_SxR}, users), {"x": values_SxR.mean(axis=0)}
    found = bootstrap_intervals(values, users, spread=spread, resamples=100_000)["x"]
    half = 4.303 * 0.3 / 3**0.5
    assert found == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=0.04)


def test_noise_of_one_name_does_not_depend_on_the_others():
    values = {"x": np.arange(40.0) % 7, "y": np.arange(40.0) % 3}
    spread = {"x": Spread(0.04, 0.01, 2), "y": Spread(0.16, 0.0, 1)}
    both = bootstrap_intervals(values, np.arange(40), spread=spread)
    one = bootstrap_intervals({"y": values["y"]}, np.arange(40), spread=spread)
    assert one["y"] == both["y"]
