"""The order of interactions, and the splits against a plain Python oracle."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_in_memory import order_by_time

from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.ordering import sort_by_user
from tca4rec_jax.data.sequences import UNKNOWN_TIME
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.splits import build_splits, hold_out
from tca4rec_jax.errors import UserError


def _splits(interactions, **fields):
    config = DataConfig(**fields)
    with tempfile.TemporaryDirectory() as folder:
        histories = sort_by_user(interactions, Path(folder, "x"), config.seed, config.ties)
        return {name: rows.copied() for name, rows in build_splits(histories, config).items()}


def _interactions(triples):
    user, item, timestamp = np.array(triples, np.int64).reshape(-1, 3).T
    return Interactions(user.astype(np.int32), item.astype(np.int32), timestamp)


def _triples(interactions):
    columns = (interactions.user, interactions.item, interactions.timestamp)
    return list(zip(*(column.tolist() for column in columns), strict=True))


TRIPLES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=60
)


@settings(max_examples=50, deadline=None)
@given(TRIPLES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_order_is_by_time_and_independent_of_the_order_in_the_file(triples, seed, random):
    ordered = _triples(order_by_time(_interactions(triples), seed))
    assert sorted(ordered) == sorted(triples)
    assert [t for *_, t in ordered] == sorted(t for *_, t in triples)
    random.shuffle(triples)
    assert _triples(order_by_time(_interactions(triples), seed)) == ordered


def test_ties_are_shuffled_not_sorted_by_item():
    triples = [(0, item, 7) for item in range(200)]
    order = order_by_time(_interactions(triples), seed=0).item
    ascending = np.mean(np.diff(order) > 0)
    assert 0.35 < ascending < 0.65  # sorted by item it would be 1
    assert order.tolist() != order_by_time(_interactions(triples), seed=1).item.tolist()


def _rows(sequences):
    """The rows as lists of (user, [(item, timestamp)])."""
    events = list(zip(sequences.items.tolist(), sequences.timestamps.tolist(), strict=True))
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [(int(u), events[a:b]) for u, (a, b) in zip(sequences.user, bounds, strict=True)]


def _oracle(triples, history_length, min_history, split):
    """The splits as lists of (user, items, timestamps); `triples` already in time order."""
    rows, seen = [], {}
    for place, (user, item, timestamp) in enumerate(triples):
        past = seen.setdefault(user, [])
        past.append((item, timestamp))
        if len(past) > min_history:
            rows.append((place, user, past[-history_length - 1 :]))
    first, second = round(len(rows) * split[0]), round(len(rows) * (split[0] + split[1]))
    period = {}
    for user, item, timestamp in triples[: rows[first][0]]:
        period.setdefault(user, []).append((item, timestamp))
    return {
        "train_sequences": [(u, past) for u, past in sorted(period.items()) if len(past) > 1],
        "train": [(u, list(past)) for _, u, past in rows[:first]],
        "validation": [(u, list(past)) for _, u, past in rows[first:second]],
        "test": [(u, list(past)) for _, u, past in rows[second:]],
    }


@pytest.mark.parametrize(("history_length", "min_history"), [(3, None), (3, 1), (5, 2), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_equal_the_oracle(history_length, min_history, seed):
    rng = np.random.default_rng(seed)
    shape = 150
    triples = np.stack(
        [rng.integers(0, 6, shape), rng.integers(0, 30, shape), rng.integers(0, 60, shape)], 1
    )
    interactions = _interactions(triples)
    split = (0.7, 0.2, 0.1)
    built = _splits(
        interactions, history_length=history_length, min_history=min_history, split=split, seed=3
    )
    ordered = _triples(order_by_time(interactions, 3))
    expected = _oracle(ordered, history_length, min_history or history_length, split)
    assert {name: _rows(sequences) for name, sequences in built.items()} == expected


def test_nothing_of_training_is_later_than_validation_and_test():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, 5, 200), rng.integers(0, 9, 200), rng.permutation(200)], 1)
    built = _splits(_interactions(triples), history_length=4)
    target_times = {name: s.timestamps[s.last_positions] for name, s in built.items()}
    assert built["train_sequences"].timestamps.max() < target_times["validation"].min()
    assert target_times["train"].max() < target_times["validation"].min()
    assert target_times["validation"].max() < target_times["test"].min()


def test_one_user_of_one_moment_has_rows():
    splits = _splits(_interactions([(0, item, 5) for item in range(10)]), history_length=2)
    assert all(len(rows) for rows in splits.values())
    assert splits["test"].tied.all()


def test_settings_that_leave_no_rows_are_refused():
    interactions = _interactions([(0, item, item) for item in range(10)])
    message = "0 interactions have 11 or more of their user before them"
    with pytest.raises(ValueError, match=message):
        _splits(interactions, history_length=11)


def _left_out(triples, history_length, min_history):
    """The splits as `_oracle` gives them; `triples` already in time order."""
    users, splits = {}, {"train_sequences": [], "train": [], "validation": [], "test": []}
    for user, *event in triples:
        users.setdefault(user, []).append(tuple(event))
    for user, events in sorted(users.items()):
        long = len(events) >= min_history + 2
        training = events[:-2] if long else events
        if len(training) > 1:
            splits["train_sequences"].append((user, training))
        for number, _ in enumerate(events):
            split = "train"
            if number >= len(training):
                split = "test" if number == len(events) - 1 else "validation"
            if number >= min_history:
                splits[split].append((user, events[max(number - history_length, 0) : number + 1]))
    return splits


@settings(max_examples=40, deadline=None)
@given(TRIPLES, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_leave_one_out_equals_the_oracle(triples, history_length, min_history, timed, seed):
    min_history = min(min_history, history_length)
    if not timed:
        triples = [(user, item, UNKNOWN_TIME) for user, item, _ in triples]
    interactions = _interactions(triples)
    expected = _left_out(_triples(order_by_time(interactions, seed)), history_length, min_history)
    settings = {"history_length": history_length, "min_history": min_history, "seed": seed}
    if not (expected["train"] and expected["test"]):
        with pytest.raises(UserError, match="too few to leave one out for validation"):
            _splits(interactions, split_by="leave_one_out", **settings)
        return
    built = _splits(interactions, split_by="leave_one_out", **settings)
    assert {name: _rows(sequences) for name, sequences in built.items()} == expected


def test_without_times_the_given_order_counts_whatever_the_seed():
    triples = [(0, item, UNKNOWN_TIME) for item in (5, 3, 4, 1)] + [(1, 2, UNKNOWN_TIME)] * 3
    for seed in range(3):
        built = _splits(_interactions(triples), split_by="leave_one_out", seed=seed)
        assert built["train_sequences"][0].tolist() == [5, 3]
        assert [row.tolist() for row in map(built["test"].__getitem__, (0, 1))] == [
            [5, 3, 4, 1],
            [2, 2, 2],
        ]


def test_users_too_short_are_only_trained_on_and_said_so(caplog):
    triples = [(0, item, item) for item in range(5)] + [(1, 7, 1), (1, 8, 2), (2, 9, 3)]
    built = _splits(_interactions(triples), split_by="leave_one_out")
    assert built["test"].user.tolist() == built["validation"].user.tolist() == [0]
    assert [row.tolist() for row in map(built["train_sequences"].__getitem__, (0, 1))] == [
        [0, 1, 2],
        [7, 8],
    ]
    assert "2 of 3 users have fewer than 3 interactions" in caplog.text
    caplog.clear()
    _splits(_interactions(triples[:5]), split_by="leave_one_out")
    assert not caplog.messages


def test_data_without_times_have_no_split_by_time():
    interactions = _interactions([(0, item, UNKNOWN_TIME) for item in range(30)])
    with pytest.raises(UserError, match="set data.split_by=leave_one_out"):
        _splits(interactions)


def _by_ratio(triples, history_length, min_history, split):
    """The splits as RecBole cuts each user's interactions; `triples` already in time order."""
    users, splits = {}, {"train_sequences": [], "train": [], "validation": [], "test": []}
    for user, *event in triples:
        users.setdefault(user, []).append(tuple(event))
    for user, events in sorted(users.items()):
        count = [int(share * len(events)) for share in split]
        count[0] = len(events) - sum(count[1:])
        for part in (2, 1):
            if count[0] <= 1:
                break
            if 0 < split[part] * len(events) < 1:
                count[part] += 1
                count[0] -= 1
        if count[0] > 1:
            splits["train_sequences"].append((user, events[: count[0]]))
        names = [name for part, name in enumerate(list(splits)[1:]) for _ in range(count[part])]
        for number, name in enumerate(names):
            if number >= min_history:
                splits[name].append((user, events[max(number - history_length, 0) : number + 1]))
    return splits


@settings(max_examples=40, deadline=None)
@given(TRIPLES, st.integers(1, 3), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25)]))
def test_ratio_equals_the_oracle(triples, min_history, split):
    interactions = _interactions(triples)
    expected = _by_ratio(_triples(order_by_time(interactions, 1)), 4, min_history, split)
    given = {"history_length": 4, "min_history": min_history, "split": split, "seed": 1}
    if not all(expected[name] for name in ("train", "validation", "test")):
        with pytest.raises(UserError, match="too few to cut each user's by"):
            _splits(interactions, split_by="ratio", **given)
        return
    built = _splits(interactions, split_by="ratio", **given)
    assert {name: _rows(sequences) for name, sequences in built.items()} == expected


@settings(max_examples=50, deadline=None)
@given(TRIPLES, st.integers(0, 3), st.integers(1, 2))
def test_cold_items_and_users_are_nowhere_in_training(triples, seed, least):
    settings = {"split_by": "ratio", "history_length": 4, "min_history": least}
    split = {"split": (0.5, 0.2, 0.3)}
    try:
        whole = _splits(_interactions(triples), **settings, **split)
        held = hold_out(whole, 0.3, 0.4, seed, least)
    except UserError:
        return  # too few
    test = _rows(whole["test"])
    targets, users = {row[-1][0] for _, row in test}, {user for user, _ in test}
    assert {name: _rows(held[name]) for name in ("validation", "test")} == {
        name: _rows(whole[name]) for name in ("validation", "test")
    }
    seen = [(user, item) for user, row in _rows(held["train_sequences"]) for item, _ in row]
    before = [(user, item) for user, row in _rows(whole["train_sequences"]) for item, _ in row]
    generator = np.random.default_rng(seed)
    cold_items, cold_users = (
        {*generator.permutation(sorted(of))[: round(share * len(of))].tolist()}
        for of, share in ((targets, 0.3), (users, 0.4))
    )
    kept = {}
    for user, item in before:
        if user not in cold_users and item not in cold_items:
            kept.setdefault(user, []).append(item)
    assert seen == [(user, item) for user, row in kept.items() if len(row) > 1 for item in row]
    rows = []
    for user, row in _rows(whole["train"]):
        left = [event for event in row if event[0] not in cold_items]
        if user not in cold_users and row[-1] in left and len(left) > least:
            rows.append((user, left))
    assert _rows(held["train"]) == rows


def test_a_share_of_test_is_cold_and_no_more_is_lost():
    rng = np.random.default_rng(0)
    triples = np.stack(
        [rng.integers(0, 30, 900), rng.integers(0, 40, 900), rng.permutation(900)], 1
    )
    whole = _splits(_interactions(triples), split_by="leave_one_out", history_length=5)
    held = hold_out(whole, 0.2, 0.1, 0, 1)
    targets = whole["test"].items[whole["test"].last_positions]
    assert np.isin(whole["train_sequences"].items, targets).any()
    cold = ~np.isin(np.unique(targets), held["train_sequences"].items)
    assert cold.sum() == round(0.2 * cold.size) > 0
    assert len(np.unique(held["train_sequences"].user)) == 27
    assert all(len(held[name]) == len(whole[name]) for name in ("validation", "test"))
    assert not np.isin(held["train"].items, np.unique(targets)[cold]).any()
