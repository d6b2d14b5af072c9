"""Metrics of lists, against ranx, RecBole and definitions in plain Python; slices; calibration."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import UNKNOWN_TIME, ItemSequences
from tca4rec_jax.evaluation.calibration import calibration, first_items
from tca4rec_jax.evaluation.lists import ListMetrics, later_targets
from tca4rec_jax.evaluation.slices import slices
from tca4rec_jax.metrics import mean_metrics, rank_in_list

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "ranking_metrics.json").read_text())
CUTOFFS = (1, 3, 5, 10)
OTHER_NAMES = {
    "hr": ("hit_rate", "hit"),
    "mrr": ("mrr", "mrr"),
    "ndcg": ("ndcg", "ndcg"),
    "recall": ("recall", "recall"),
    "popularity": (None, "averagepopularity"),
    "coverage": (None, "itemcoverage"),
    "gini": (None, "giniindex"),
}


ragged = Ragged.of


def sequences(rows, user=None, times=None):
    flat = ragged(rows)
    times = np.arange(flat.values.size) if times is None else np.concatenate(times)
    return ItemSequences(
        np.arange(len(rows)) if user is None else np.array(user), flat.values, flat.offsets, times
    )


def test_ranx_and_recbole_agree_where_they_define_the_same():
    items_RxM, targets = np.array(GOLDEN["lists"]), GOLDEN["targets"]
    given = ListMetrics(np.array(GOLDEN["counts"]), ragged(targets), ragged(targets))
    found = mean_metrics(rank_in_list(items_RxM, np.array([one[0] for one in targets])), CUTOFFS)
    found |= {name: one.mean() for name, one in given.of_rows(items_RxM, CUTOFFS).items()}
    found |= given.of_all(items_RxM, CUTOFFS)
    for (name, (ranx, recbole)), k in itertools.product(OTHER_NAMES.items(), CUTOFFS):
        assert found[f"{name}@{k}"] == pytest.approx(GOLDEN["recbole"][f"{recbole}@{k}"], abs=1e-6)
        if ranx:
            assert found[f"{name}@{k}"] == pytest.approx(GOLDEN["ranx"][f"{ranx}@{k}"], abs=1e-6)


def plain_metrics(listed, targets, count_I, vectors_IxD, k):
    first = [item for item in listed[:k] if item >= 0]
    total = sum(count_I) + len(count_I)
    unit = [v / np.linalg.norm(v) if v.any() else v for v in vectors_IxD]
    pairs = list(itertools.combinations(first, 2))
    return {
        "recall": len({*first} & {*targets}) / len({*targets}),
        "novelty": np.mean([-np.log2((count_I[i] + 1) / total) for i in first]) if first else None,
        "popularity": np.mean([count_I[i] for i in first]) if first else None,
        "diversity": np.mean([1 - unit[a] @ unit[b] for a, b in pairs]) if pairs else None,
    }


def test_metrics_of_short_and_empty_lists_are_as_defined():
    rng = np.random.default_rng(0)
    items_RxM = np.stack([rng.permutation(9)[:5] for _ in range(30)])
    for row, kept in enumerate(rng.integers(0, 6, 30)):
        items_RxM[row, kept:] = -1
    targets = [rng.integers(0, 9, rng.integers(1, 5)).tolist() for _ in range(30)]
    vectors_IxD = rng.normal(size=(9, 4)).astype(np.float32)
    vectors_IxD[2] = 0  # of no direction: like nothing
    count_I = rng.integers(0, 6, 9)
    given = ListMetrics(count_I, ragged(targets), ragged(targets), vectors_IxD)
    found = given.of_rows(items_RxM, (1, 2, 5))
    assert "diversity@1" not in found  # there is no pair
    for k, row in itertools.product((1, 2, 5), range(30)):
        plain = plain_metrics(items_RxM[row], targets[row], count_I, vectors_IxD, k)
        for name, value in plain.items():
            if f"{name}@{k}" in found:
                one = found[f"{name}@{k}"]
                assert bool(np.ma.getmaskarray(one)[row]) == (value is None), (name, k, row)
                assert value is None or one[row] == pytest.approx(value, abs=1e-6), (name, k, row)


def test_lists_more_popular_than_histories_have_a_lift():
    count_I = np.array([8, 4, 2, 0])
    histories = ragged([[2, 2], [], [1]])
    given = ListMetrics(count_I, ragged([[0], [0], [0]]), histories)
    found = given.of_all(np.array([[0, 1], [0, 3], [-1, -1]]), (1, 2))
    assert found["popularity lift@1"] == pytest.approx(8 / 3 - 1)
    assert found["popularity lift@2"] == pytest.approx(5 / 3 - 1)
    assert (found["coverage@1"], found["coverage@2"]) == (0.25, 0.75)
    assert found["gini@1"] == 0.75  # one item of four has all
    assert given.of_all(np.full((3, 2), -1), (1,)) == {}


def test_targets_are_those_of_the_users_later_rows():
    rows, user = [[5, 0], [6, 1], [5, 0, 2], [7, 1], [5, 0, 2, 3]], [4, 2, 4, 9, 4]
    in_time = sequences(rows, user=user)
    found = later_targets(in_time, np.array([0, 1, 2, 4]))
    assert [found[row].tolist() for row in range(4)] == [[0, 2, 3], [1], [2, 3], [3]]
    order = [4, 0, 3, 2, 1]  # published splits are in no order of time
    found = later_targets(in_time.take(np.array(order)), np.array([1, 4, 3, 0]))
    assert [found[row].tolist() for row in range(4)] == [[0, 2, 3], [1], [2, 3], [3]]
    untimed = sequences(rows, user=user, times=[[UNKNOWN_TIME] * len(row) for row in rows])
    assert later_targets(untimed, np.array([2]))[0].tolist() == [2, 3]


def test_a_slice_of_few_users_is_left_out():
    train = sequences([[0, 1]] * 12)
    rows = sequences([[0, 0]] * 24, user=[*range(12), *[99] * 12])  # cold rows are of one user
    histories = ragged([[0]] * 24)
    assert list(slices(rows, histories, train, 10)) == ["warm user"]


def test_rows_are_in_the_slices_that_their_names_say(monkeypatch):
    monkeypatch.setattr("tca4rec_jax.evaluation.slices.LEAST_USERS", 1)
    train = sequences([[0, 0, 1], [0, 1, 2], [0, 3, 3, 3]], user=[0, 1, 2])
    rows = [[1, 0, 0], [4, 9], [3, 3, 1, 2, 0, 5], [9] * 12 + [3]]
    times = [[1, 2, 2], [1, 2], [1, 2, 3, 4, 5, 6], [1] * 11 + [2, 2]]
    rows = sequences(rows, user=[0, 7, 1, 8], times=times)
    before = np.delete(rows.items, rows.last_positions)
    histories = Ragged.from_lengths(before, rows.lengths - 1)
    found = slices(rows, histories, train, 10)
    assert {name: np.flatnonzero(inside).tolist() for name, inside in found.items()} == {
        "warm item": [0, 3],
        "cold item": [1, 2],
        "warm user": [0, 2],
        "cold user": [1, 3],
        "head": [0, 3],  # two of ten items, 0 and 3
        "tail": [1, 2],
        "tied": [0, 3],
        "untied": [1, 2],
        "seen before": [0],
        "not seen before": [1, 2, 3],
        "history 0 to 4": [0, 1],
        "history 5 to 9": [2],
        "history 10 to 19": [3],
    }


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated():
    rng = np.random.default_rng(0)
    logits_RxI = 1.5 * rng.normal(size=(6000, 20)).astype(np.float32)
    p_RxI = np.asarray(jax.nn.softmax(logits_RxI / 2, axis=1), np.float64)
    drawn_Rx1 = rng.random((6000, 1)) * p_RxI.sum(axis=1, keepdims=True)
    target_R = np.argmax(np.cumsum(p_RxI, axis=1) > drawn_Rx1, axis=1).astype(np.int32)
    true, sharp = (
        calibration(first_items(logits_RxI, DENSE, target_R, beta, (1, 5, 30)), (1, 5, 30))
        for beta in (2.0, 0.5)
    )
    for k in (1, 5):
        assert true[f"mass@{k}"] == pytest.approx(true[f"hr@{k}"], abs=0.02)
        assert true[f"ece@{k}"] < 0.03 < 0.2 < sharp[f"ece@{k}"]
        best_RxK = np.argsort(-p_RxI, axis=1)[:, :k]
        mass_R = np.take_along_axis(p_RxI, best_RxK, axis=1).sum(axis=1)
        assert true[f"mass@{k}"] == pytest.approx(mass_R.mean(), rel=1e-5)
        hit_R = (best_RxK == target_R[:, None]).any(axis=1)
        bins = np.array_split(np.argsort(mass_R), 10)
        gaps = [abs(mass_R[rows].mean() - hit_R[rows].mean()) / 10 for rows in bins]
        assert true[f"ece@{k}"] == pytest.approx(sum(gaps), abs=1e-5)
    assert true["ece@30"] == pytest.approx(0, abs=1e-5)  # all items, as sure as that


def test_user_vectors_and_their_logits_are_calibrated_alike():
    rng = np.random.default_rng(1)
    cf_RxD, table_IxD = rng.normal(size=(30, 4)), rng.normal(size=(9, 4))
    cf_RxD, table_IxD = cf_RxD.astype(np.float32), table_IxD.astype(np.float32)
    target_R = rng.integers(0, 9, 30).astype(np.int32)
    of_vectors = first_items(cf_RxD, CFItems(table_IxD), target_R, 1.0, (1, 3), batch_size=7)
    of_logits = first_items(cf_RxD @ table_IxD.T, DENSE, target_R, 1.0, (1, 3))
    for one, other in zip(of_vectors, of_logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_temperature_makes_no_ties():
    lower_Rx1 = np.random.default_rng(0).random((200, 1), np.float32) + 1
    logits_Rx2 = np.concatenate([lower_Rx1, np.nextafter(lower_Rx1, np.float32(9))], axis=1)
    assert (lower_Rx1 / np.float32(3) == logits_Rx2[:, 1:] / np.float32(3)).any()
    found = first_items(logits_Rx2, DENSE, np.ones(200, np.int32), 3.0, (1,))
    assert not found.rank_R.any()
