import numpy as np
import pytest

from tca4rec_jax.cf.windows import FlatRows, cut_rows, windows_at
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences


def sequences_of(rows):
    offsets = np.cumsum([0, *map(len, rows)])
    items = np.concatenate(rows)
    return ItemSequences(np.arange(len(rows)), items, offsets, np.full(len(items), -1))


def left_padded(items, length):
    items = list(items)[-length:]
    return [PAD_ITEM] * (length - len(items)) + items


@pytest.mark.parametrize("length", [1, 3, 6])
def test_windows_of_every_position_against_a_loop(length):
    rows = [[5, 3, 8, 1, 2], [7], [4, 4, 6]]
    sequences = sequences_of(rows)
    history, target = [], []
    for row in rows:
        for place in range(len(row)):
            history.append(left_padded(row[:place], length))
            target.append(left_padded(row[: place + 1], length))
    positions = np.arange(len(sequences.items))
    got = windows_at(FlatRows.of(sequences), positions, length)
    np.testing.assert_array_equal(got.history_BxS, history)
    np.testing.assert_array_equal(got.target_BxS, target)
    np.testing.assert_array_equal(got.user_B, [0] * 5 + [1] + [2] * 3)


def test_windows_of_last_positions_are_the_histories_of_the_rows():
    sequences = sequences_of([[5, 3, 8, 1, 2], [7, 0], [4, 4, 6]])
    history, target = sequences.histories_and_targets(3)
    got = windows_at(FlatRows.of(sequences), sequences.last_positions, 3)
    np.testing.assert_array_equal(got.history_BxS, history)
    np.testing.assert_array_equal(got.target_BxS[:, -1], target)


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_windows_of_rows_have_every_item_as_a_target_once(length):
    sequences = sequences_of([[5, 3, 8, 1, 2, 0, 6], [7], [4, 4, 6]])
    ends, counts = cut_rows(sequences, length)
    targets = [end - back for end, count in zip(ends, counts, strict=True) for back in range(count)]
    assert sorted(targets) == list(range(11))
    assert (sequences.row_of(ends) == sequences.row_of(ends - counts + 1)).all()
    assert counts.max() <= length
    assert set(sequences.last_positions) <= set(ends)
