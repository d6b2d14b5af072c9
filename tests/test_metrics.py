"""Ranks, metrics of rankings and of answers."""

import numpy as np
import pytest

from tca4rec_jax.metrics import (
    ahead_of,
    answer_metrics,
    auc,
    hit_rate,
    mean_metrics,
    metric_differences,
    ndcg,
    rank_in_list,
    reciprocal_rank,
)


def stable_sort_rank(scores_I: np.ndarray, target: int) -> int:
    order = sorted(range(len(scores_I)), key=lambda item: (-scores_I[item], item))
    return order.index(target)


def rank_in_batch(scores_BxI, target_B):
    target_score_B = scores_BxI[np.arange(len(target_B)), target_B]
    ahead_BxI = ahead_of(scores_BxI, np.arange(scores_BxI.shape[1]), target_score_B, target_B)
    return ahead_BxI.sum(axis=1)


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
    np.testing.assert_allclose(reciprocal_rank(ranks_R, 10), [1, 1 / 3, 0.1, 0, 0])
    means = mean_metrics(ranks_R, cutoffs=(3,))
    assert means == pytest.approx({"hr@3": 0.4, "ndcg@3": 0.3, "mrr@3": 4 / 15})


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


def test_differences_are_of_the_same_rows():
    ranks_R, others_R = np.array([0, 4, -1]), np.array([1, 4, 2])
    found = metric_differences(ranks_R, others_R, 3)
    np.testing.assert_array_equal(found["hr@3"], [0, 0, -1])
    np.testing.assert_allclose(found["ndcg@3"], [1 - 1 / np.log2(3), 0, -0.5])
    with pytest.raises(ValueError, match="same rows in the same order"):
        metric_differences(ranks_R, others_R[:2], 3)


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
