import numpy as np
import pytest

from tca4rec_jax.metrics import hit_rate, mean_metrics, ndcg, rank_of_target


def stable_sort_rank(scores_I: np.ndarray, target: int) -> int:
    order = sorted(range(len(scores_I)), key=lambda item: (-scores_I[item], item))
    return order.index(target)


@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_rank_is_the_position_in_a_stable_sort(levels):
    rng = np.random.default_rng(0)
    scores_RxI = rng.integers(0, levels, (23, 17)).astype(np.float32)
    target_R = rng.integers(0, 17, 23)
    expected = [stable_sort_rank(scores_RxI[r], target_R[r]) for r in range(23)]
    # 23 rows in batches of 5: the last batch is padded.
    np.testing.assert_array_equal(rank_of_target(scores_RxI, target_R, batch_size=5), expected)


def test_minus_infinity_is_a_score():
    scores_RxI = np.array([[-np.inf, 0.0, -np.inf]], np.float32)
    assert rank_of_target(scores_RxI, np.array([2])).tolist() == [2]


def test_no_rows_have_no_ranks():
    assert rank_of_target(np.zeros((0, 4)), np.zeros(0, np.int32)).shape == (0,)


def test_bad_scores_are_errors_that_name_the_row():
    scores_RxI = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"row 1: target 4 .* 0\.\.3"):
        rank_of_target(scores_RxI, np.array([0, 4, 1]))
    with pytest.raises(ValueError, match="one target per row"):
        rank_of_target(scores_RxI, np.array([0, 1]))
    scores_RxI[2, 0] = np.nan
    with pytest.raises(ValueError, match="row 2: scores contain NaN"):
        rank_of_target(scores_RxI, np.array([0, 1, 2]))


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
