"""Rows of unequal length."""

import numpy as np

from tca4rec_jax.data.ragged import Ragged


def test_rows_followed_by_other_rows():
    rows = [[1, 2], [], [3], [4, 5, 6]]
    others = [[7], [8, 9], [], [10]]
    left, right = (
        Ragged.from_lengths(np.array(sum(part, []), np.int32), np.array(list(map(len, part))))
        for part in (rows, others)
    )
    # A part of larger ones, whose values begin elsewhere.
    left = Ragged(np.concatenate([[99, 98], left.values]).astype(np.int32), left.offsets + 2)
    both = left.followed_by(right)
    assert both.values.dtype == np.int32
    expected = [a + b for a, b in zip(rows, others, strict=True)]
    assert [both[row].tolist() for row in range(4)] == expected


def test_row_of_a_position():
    """Rows without values hold no position."""
    rows = Ragged.from_lengths(np.arange(6), np.array([2, 0, 3, 1]))
    np.testing.assert_array_equal(rows.row_of(np.arange(6)), [0, 0, 2, 2, 2, 3])
    assert rows.row_of(4) == 2
