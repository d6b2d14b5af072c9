"""Ranks, metrics, and bootstrap intervals against a loop that draws row numbers."""

import numpy as np
import pytest

from tca4rec_jax.metrics import (
    answer_metrics,
    auc,
    bootstrap_intervals,
    hit_rate,
    mean_metrics,
    mean_over_rows,
    metric_values,
    ndcg,
    paired_differences,
    rank_in_batch,
    rank_in_list,
    ranking_metrics,
)


def stable_sort_rank(scores_I: np.ndarray, target: int) -> int:
    order = sorted(range(len(scores_I)), key=lambda item: (-scores_I[item], item))
    return order.index(target)


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_rank_is_the_position_in_a_stable_sort(levels):
    rng = np.random.default_rng(0)
    scores_BxI = rng.integers(0, levels, (23, 17)).astype(np.float32)
    target_B = rng.integers(0, 17, 23)
    expected = [stable_sort_rank(scores_BxI[b], target_B[b]) for b in range(23)]
    np.testing.assert_array_equal(rank_in_batch(scores_BxI, target_B), expected)


def test_minus_infinity_is_a_score():
    scores_BxI = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    assert rank_in_batch(scores_BxI, np.array([2])).tolist() == [2]


def test_metrics_of_known_ranks():
    ranks_R = np.array([0, 2, 9, 10, -1])
    np.testing.assert_array_equal(hit_rate(ranks_R, 10), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(hit_rate(ranks_R, 1), [1, 0, 0, 0, 0])
    np.testing.assert_allclose(ndcg(ranks_R, 10), [1, 0.5, 1 / np.log2(11), 0, 0])
    means = mean_metrics(ranks_R, cutoffs=(1, 3))
    assert means == pytest.approx({"hr@1": 0.2, "hr@3": 0.4, "ndcg@1": 0.2, "ndcg@3": 0.3})


def test_metrics_reject_what_they_cannot_mean():
    with pytest.raises(ValueError, match="at least 1"):
        hit_rate(np.array([0]), 0)
    with pytest.raises(ValueError, match="integers"):
        ndcg(np.array([0.5]), 10)
    with pytest.raises(ValueError, match="no rows"):
        mean_metrics(np.zeros(0, np.int32))


def test_rank_is_the_place_in_the_list():
    listed_RxM = np.array([[3, 1, 2], [4, -1, -1], [0, 5, 6], [-1, -1, -1]])
    assert rank_in_list(listed_RxM, np.array([2, 4, 1, 0])).tolist() == [2, 0, -1, -1]


def test_rank_by_title_counts_any_item_of_the_title():
    leaf_of_item = np.array([0, 1, 1, 2])  # items 1 and 2 share a title
    leaves_RxM, items_RxM = np.array([[2, 1, 0]]), np.array([[3, 1, 2, 0]])
    target_R = np.array([2])
    assert rank_in_list(items_RxM, target_R).tolist() == [2]
    assert rank_in_list(leaves_RxM, leaf_of_item[target_R]).tolist() == [1]


def test_rank_rejects_what_it_cannot_rank():
    with pytest.raises(ValueError, match="row 1: the list .* repeats"):
        rank_in_list(np.array([[0, 1, -1, -1], [2, 3, 2, -1]]), np.array([0, 2]))
    with pytest.raises(ValueError, match="row 1: target -1"):
        rank_in_list(np.array([[0], [1]]), np.array([0, -1]))
    with pytest.raises(ValueError, match="one target per row"):
        rank_in_list(np.array([[0], [1]]), np.array([0]))


def loop_bootstrap(values_R, resamples, rng):
    size = len(values_R)
    means = [values_R[rng.integers(0, size, size)].mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975])


def test_intervals_agree_with_a_loop_over_resamples():
    rng = np.random.default_rng(1)
    ranks_R = rng.integers(-1, 15, 300)
    values = metric_values(ranks_R, (1, 10))
    intervals = ranking_metrics(ranks_R, (1, 10), seed=3)
    for name, values_R in values.items():
        low, high = loop_bootstrap(values_R, 4000, rng)
        width = high - low
        assert intervals[name].mean == pytest.approx(values_R.mean())
        assert intervals[name].low == pytest.approx(low, abs=0.08 * width)
        assert intervals[name].high == pytest.approx(high, abs=0.08 * width)


def test_about_95_of_100_intervals_cover_the_true_mean():
    rng = np.random.default_rng(0)
    draws_RxJ = rng.normal(size=(200, 300))
    intervals = bootstrap_intervals({str(j): draws_RxJ[:, j] for j in range(300)}, resamples=500)
    covered = np.mean([i.low <= 0 <= i.high for i in intervals.values()])
    assert 0.90 < covered < 0.985


def test_intervals_are_seeded():
    ranks_R = np.arange(50) % 13
    assert ranking_metrics(ranks_R, seed=1) == ranking_metrics(ranks_R, seed=1)
    assert ranking_metrics(ranks_R, seed=1) != ranking_metrics(ranks_R, seed=2)


def test_paired_differences_are_of_the_same_rows():
    rng = np.random.default_rng(0)
    ranks_R = rng.integers(-1, 12, 400)
    same = paired_differences(ranks_R, ranks_R)["ndcg@10"]
    assert same == (0.0, 0.0, 0.0)
    better_R = np.where(np.arange(400) % 20 == 0, 0, ranks_R)
    gain = paired_differences(better_R, ranks_R)["ndcg@10"]
    ours, theirs = (ranking_metrics(r, (10,))["ndcg@10"] for r in (better_R, ranks_R))
    assert gain.mean == pytest.approx(ours.mean - theirs.mean)
    # Pairing removes what the rows have in common: the unpaired intervals overlap, this one is
    # clear of 0.
    assert gain.low > 0
    assert ours.low < theirs.high


def test_bad_values_are_errors():
    with pytest.raises(ValueError, match="row 1: x is nan"):
        bootstrap_intervals({"x": np.array([0.0, np.nan])})
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_intervals({"x": np.zeros(0)})
    with pytest.raises(ValueError, match="same rows"):
        bootstrap_intervals({"x": np.zeros(2), "y": np.zeros(3)})
    with pytest.raises(ValueError, match="level"):
        bootstrap_intervals({"x": np.zeros(2)}, level=95)
    with pytest.raises(ValueError, match="same rows in the same order"):
        paired_differences(np.zeros(3, int), np.zeros(4, int))


def _auc_of_pairs(scores, yes):
    pairs = [(a > b) + (a == b) / 2 for a in scores[yes] for b in scores[~yes]]
    return np.mean(pairs) if pairs else None


def test_auc_counts_pairs_over_all_rows_and_within_users():
    rng = np.random.default_rng(0)
    scores, yes, user = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4, rng.integers(0, 9, 60)
    yes[user == 3] = False  # a user of one answer counts in the one and not in the other
    found = answer_metrics(scores, yes, user, resamples=300)
    assert found["auc"].mean == pytest.approx(_auc_of_pairs(scores, yes))
    own = [_auc_of_pairs(scores[user == u], yes[user == u]) for u in range(9)]
    defined = [one for one in own if one is not None]
    assert len(defined) < 9
    assert found["uauc"].mean == pytest.approx(np.mean(defined))
    for one in found.values():
        assert one.low < one.mean < one.high
    times = rng.integers(0, 4, (2, 60))
    expected = [_auc_of_pairs(np.repeat(scores, t), np.repeat(yes, t)) for t in times]
    np.testing.assert_allclose(auc(scores, yes, times), expected)
    assert answer_metrics(scores, np.ones(60, bool), user) == {}
    assert [*answer_metrics(scores, yes, np.arange(60))] == ["auc"]  # no user has both answers


def test_intervals_of_auc_resample_users_with_all_their_rows():
    """Copies of every user's rows change no interval; as many other users would."""
    rng = np.random.default_rng(1)
    scores, yes, user = rng.random(200), rng.random(200) < 0.5, rng.integers(0, 20, 200)
    once = answer_metrics(scores, yes, user)
    thrice = answer_metrics(*(np.tile(one, 3) for one in (scores, yes, user)))
    for name in once:
        np.testing.assert_allclose(once[name], thrice[name], atol=1e-12)


def test_intervals_of_means_resample_users_with_all_their_rows():
    values, user = np.random.default_rng(0).normal(size=60), np.arange(60) // 2
    once, thrice = (
        mean_over_rows(np.tile(values, n), np.tile(user, n), resamples=500) for n in (1, 3)
    )
    assert thrice == pytest.approx(once)
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        means.append(np.mean([values[2 * drawn], values[2 * drawn + 1]]))
    expected = values.mean(), *np.quantile(means, [0.025, 0.975])
    assert once == pytest.approx(expected, abs=0.06)
    assert once.mean == values.mean()
    with pytest.raises(ValueError, match="row 1: the value is nan"):
        mean_over_rows(np.array([1, np.nan]), np.arange(2))


def test_differences_of_auc_are_paired():
    rng = np.random.default_rng(2)
    yes, user = rng.random(120) < 0.5, rng.integers(0, 12, 120)
    scores = rng.random(120) + 0.2 * yes
    other = scores + 0.1 * rng.random(120)
    one, two = (answer_metrics(each, yes, user) for each in (scores, other))
    found = answer_metrics(other, yes, user, baseline_R=scores)
    for name, difference in found.items():
        assert difference.mean == pytest.approx(two[name].mean - one[name].mean)
        assert difference.high - difference.low < (one[name].high - one[name].low) / 2 > 0
    assert answer_metrics(scores, yes, user, baseline_R=scores)["auc"] == (0.0, 0.0, 0.0)
