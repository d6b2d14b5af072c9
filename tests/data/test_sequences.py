"""ItemSequences against plain Python lists."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.data import sequences as of_sequences
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import PAD_ITEM, SPLITS, ItemSequences, RecData, SplitReader


def _sequences(rows, timestamps=None, users=None):
    offsets = np.cumsum([0, *map(len, rows)])
    flat = [item for row in rows for item in row]
    times = [-1] * len(flat) if timestamps is None else [t for row in timestamps for t in row]
    return ItemSequences(
        np.arange(len(rows)) if users is None else np.array(users),
        np.array(flat, np.int64),
        offsets,
        np.array(times, np.int64),
    )


ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 6))
def test_histories_and_targets_equal_list_slices(rows, history_length):
    history, target = _sequences(rows).histories_and_targets(history_length)
    assert history.dtype == target.dtype == np.int32
    for r, row in enumerate(rows):
        recent = row[:-1][-history_length:]
        assert history[r].tolist() == [PAD_ITEM] * (history_length - len(recent)) + recent
        assert target[r] == row[-1]


@settings(max_examples=50, deadline=None)
@given(ROWS, st.data())
def test_take_reorders_rows(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = _sequences(rows).take(chosen)
    assert [taken[r].tolist() for r in range(len(taken))] == [rows[r] for r in chosen]
    assert taken.user.tolist() == chosen


def test_take_accepts_a_mask():
    taken = _sequences([[1, 2], [3], [4, 5, 6]]).take(np.array([True, False, True]))
    assert [taken[0].tolist(), taken[1].tolist()] == [[1, 2], [4, 5, 6]]
    assert taken[-1].tolist() == [4, 5, 6]


def test_rows_outside_are_refused():
    sequences = _sequences([[1], [2]])
    with pytest.raises(IndexError):
        sequences[2]
    with pytest.raises(IndexError):
        sequences.take([-1])


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 3))
def test_repeated_items_are_found_in_whichever_rows_are_compared_at_once(rows, at_once):
    repeated = any(len({*row}) < len(row) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_sequences, "_ROWS_AT_ONCE", at_once)
        assert _sequences(rows).repeat_items == repeated


def test_repeated_items_are_found_in_little_memory():
    rows = np.random.default_rng(0).integers(0, 2**31 - 1, (20, 10_000))
    sequences = _sequences(np.sort(rows).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_sequences, "_ROWS_AT_ONCE", 4)
        tracemalloc.start()
        assert not sequences.repeat_items
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * sequences.items.size  # one array of int64 is 8 bytes an item


def test_tied_compares_the_target_with_the_item_before_it():
    sequences = _sequences([[0, 1], [0, 1], [0, 1], [5], [6]], [[7, 7], [6, 7], [-1, -1], [7], [7]])
    assert sequences.tied.tolist() == [True, False, False, False, False]


def test_content_hash_depends_on_every_array():
    base = _sequences([[1, 2], [3]], [[5, 6], [7]])
    assert base.content_hash() == _sequences([[1, 2], [3]], [[5, 6], [7]]).content_hash()
    others = [
        _sequences([[1, 2], [4]], [[5, 6], [7]]),
        _sequences([[1], [2, 3]], [[5], [6, 7]]),
        _sequences([[1, 2], [3]], [[5, 6], [8]]),
        _sequences([[1, 2], [3]], [[5, 6], [7]], users=[0, 2]),
    ]
    assert len({base.content_hash(), *(other.content_hash() for other in others)}) == 5


@pytest.mark.parametrize(
    ("user", "items", "offsets", "timestamps", "message"),
    [
        ([0], [1, 2], [0, 1], [0, 0], "number of items 2"),
        ([0, 1], [1, 2], [0, 2], [0, 0], "3 offsets"),
        ([0, 1], [1, 2], [0, 2, 2], [0, 0], "row 1 has no item"),
        ([0], [1, -1], [0, 2], [0, 0], r"items\[1\] is -1"),
        ([2**32 + 1], [1, 2], [0, 2], [0, 0], r"user\[0\] is 4294967297, expected 0..2147483647"),
        ([0], [1, 2], [0, 2], [0], "2 items but 1 timestamps"),
        ([0], [1, 2], [0, 2], [0, -5], r"timestamps\[1\] is -5"),
        ([0], [1.5, 2.0], [0, 2], [0, 0], "items must be a one-dimensional array of integers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(user, items, offsets, timestamps, message):
    arrays = (np.array(x) for x in (user, items, offsets, timestamps))
    with pytest.raises(ValueError, match=message):
        ItemSequences(*arrays)


def _splits(rows):
    return {name: _sequences(rows) for name in SPLITS}


def test_rec_data_refuses_items_outside_the_catalogue():
    catalogue = Catalogue(("a", "b"), ("A", "B"))
    RecData(catalogue, _splits([[0, 1]]))
    bad = {**_splits([[0, 1]]), "test": _sequences([[0, 1], [1, 2, 0]])}
    with pytest.raises(ValueError, match="row 1 of the split 'test' has item index 2"):
        RecData(catalogue, bad)


def test_rec_data_refuses_missing_or_empty_splits():
    catalogue = Catalogue(("a", "b"), ("A", "B"))
    splits = _splits([[0, 1]])
    empty = splits["test"].take(np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="'validation' has no rows"):
        RecData(catalogue, {**splits, "validation": empty})
    del splits["train"]
    with pytest.raises(ValueError, match="expected the splits"):
        RecData(catalogue, splits)


def test_a_split_is_read_once_and_checked_when_it_is_asked_for():
    catalogue, read = Catalogue(("a", "b"), ("A", "B")), []
    splits = {**_splits([[0, 1]]), "test": _sequences([[0, 1], [1, 2, 0]])}

    def reading(name):
        read.append(name)
        return splits[name]

    data = RecData(catalogue, SplitReader(reading, catalogue))
    assert read == []
    assert list(data.splits) == list(SPLITS)
    assert data.splits["train"] is data.splits["train"]
    with pytest.raises(ValueError, match="row 1 of the split 'test' has item index 2"):
        data.splits["test"]
    assert read == ["train", "test"]
    with pytest.raises(KeyError):
        data.splits["all"]
