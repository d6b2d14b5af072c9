"""Items with the same codes: what each policy does."""

import itertools

import numpy as np
import pytest

from tca4rec_jax.semantic_ids.collisions import (
    by_assignment,
    by_sinkhorn,
    ids_of_codes,
    make_unique,
)
from tca4rec_jax.semantic_ids.k_means import Quantised


def _quantised(twins=0, items=60):
    """Four first codes; 64 last ones, of which only those near 0 are some item's nearest."""
    rng = np.random.default_rng(0)
    last_IxE = 0.4 * rng.normal(size=(items, 6)).astype(np.float32)
    last_IxE[:twins] = last_IxE[0]
    last_KxE = rng.normal(size=(64, 6)).astype(np.float32)
    nearest_I = np.square(last_IxE[:, None] - last_KxE).sum(axis=2).argmin(axis=1)
    first_I = np.where(np.arange(items) < twins, 0, np.arange(items) % 4)
    codes_IxL = np.stack([first_I, nearest_I], axis=1).astype(np.int32)
    return Quantised(codes_IxL, last_IxE, last_KxE, (0.5, 0.1))


def _sharing(rows):
    return sum(rows.count(row) > 1 for row in rows)


def _rows(codes):
    return [tuple(codes[item]) for item in range(len(codes))]


def test_none_leaves_them_and_says_how_many():
    quantised = _quantised()
    codes, sharing = make_unique(quantised, "none")
    rows = list(map(tuple, quantised.codes_IxL.tolist()))
    assert _rows(codes) == rows
    assert sharing == {"quantiser": _sharing(rows)}
    assert _sharing(rows) > 20


def test_a_counter_numbers_the_items_of_a_group_in_order():
    codes_IxL = np.array([[1, 2], [0, 5], [1, 2], [3, 3], [1, 2], [0, 5]], np.int32)
    nothing = np.zeros((6, 1), np.float32)
    codes, sharing = make_unique(Quantised(codes_IxL, nothing, nothing, (0.5, 0.1)), "counter")
    expected = [(1, 2, 0), (0, 5, 0), (1, 2, 1), (3, 3), (1, 2, 2), (0, 5, 1)]
    assert _rows(codes) == expected
    assert sharing == {"quantiser": 5, "counter": 0}
    ids = ids_of_codes(codes, list("abcdef"))
    assert ids.texts[2] == "<a_1><b_2><c_1>"
    assert ids.texts[3] == "<a_3><b_3>"


@pytest.mark.parametrize("requantise", [by_sinkhorn, by_assignment])
def test_only_last_codes_move_and_fewer_items_share_theirs(requantise):
    quantised = _quantised()
    before = list(map(tuple, quantised.codes_IxL.tolist()))
    after = list(map(tuple, requantise(quantised).tolist()))
    assert [row[0] for row in after] == [row[0] for row in before]
    assert _sharing(before) > 0
    assert _sharing(after) < _sharing(before) / 2


def test_the_assignment_has_the_least_distances_of_all():
    last_IxE = np.array([[0.0], [0.1], [0.3], [5.0]], np.float32)
    last_KxE = np.array([[0.0], [1.0], [-2.0], [5.0]], np.float32)
    codes_IxL = np.array([[0, 0], [0, 0], [0, 0], [1, 3]], np.int32)
    quantised = Quantised(codes_IxL, last_IxE, last_KxE, (0.5, 0.1))
    found = by_assignment(quantised)

    def cost(codes):
        return np.square(last_IxE[:3, 0] - last_KxE[list(codes), 0]).sum()

    assert cost(found[:3, 1]) == min(map(cost, itertools.permutations(range(4), 3)))
    assert found[3].tolist() == [1, 3]


def test_more_items_than_last_codes_leave_some_for_the_counter():
    codes_IxL = np.zeros((6, 2), np.int32)
    vectors = np.arange(6, dtype=np.float32)[:, None]
    quantised = Quantised(codes_IxL, vectors, vectors[:4], (0.5, 0.1))
    codes, sharing = make_unique(quantised, "assignment")
    assert sharing == {"quantiser": 6, "assignment": 3, "counter": 0}
    assert len({*_rows(codes)}) == 6


def test_what_sinkhorn_cannot_tell_apart_gets_a_counter():
    codes, sharing = make_unique(_quantised(twins=3), "sinkhorn")
    assert sharing["quantiser"] > sharing["sinkhorn"] >= 3  # three items with one vector
    assert sharing["counter"] == 0
    rows = _rows(codes)
    assert len(set(rows)) == len(rows)
    assert {len(row) for row in rows} == {2, 3}
    _, sharing = make_unique(_quantised(twins=3), "assignment")
    assert sharing["assignment"] == 0  # here they need none


@pytest.mark.parametrize("policy", ["assignment", "sinkhorn", "counter"])
def test_without_collisions_nothing_changes(policy):
    codes_IxL = np.array([[0, 0], [0, 1], [1, 0]], np.int32)
    nothing = np.zeros((3, 2), np.float32)
    codes, sharing = make_unique(Quantised(codes_IxL, nothing, nothing, (0.5, 0.1)), policy)
    assert _rows(codes) == list(map(tuple, codes_IxL.tolist()))
    assert set(sharing.values()) == {0}
