"""Candidates: a row's target among items outside its history."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca4rec_jax.data.candidates import draw_candidates
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError

ITEMS = 9
ITEM = st.integers(0, ITEMS - 1)


@given(
    rows=st.lists(st.tuples(st.lists(ITEM, max_size=6), ITEM), min_size=1, max_size=5),
    allowed=st.lists(st.booleans(), min_size=ITEMS, max_size=ITEMS),
    count=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_a_target_and_distinct_allowed_items_outside_its_history(rows, allowed, count, seed):
    histories = Ragged.of([history for history, _ in rows], np.int32)
    targets = np.array([target for _, target in rows])
    free = [
        {item for item in range(ITEMS) if allowed[item]} - {*history, target}
        for history, target in rows
    ]
    arguments = histories, targets, np.array(allowed), count, np.random.default_rng(seed)
    short = [row for row, items in enumerate(free) if len(items) < count - 1]
    if short:
        with pytest.raises(UserError, match=f"row {short[0]} has {len(free[short[0]])} allowed"):
            draw_candidates(*arguments)
        return
    drawn = draw_candidates(*arguments)
    assert drawn.shape == (len(rows), count)
    assert drawn.dtype == np.int32
    for candidates, (_, target), items in zip(drawn.tolist(), rows, free, strict=True):
        assert len({*candidates}) == count
        assert {*candidates} - items == {target}


def test_every_item_is_as_likely_as_any_and_every_place():
    rows = 20_000
    histories = Ragged.of([[0, 1]] * rows, np.int32)
    targets, allowed = np.full(rows, 2), np.arange(8) != 3
    drawn = draw_candidates(histories, targets, allowed, 3, np.random.default_rng(0))
    counts = np.bincount(drawn.ravel(), minlength=8)
    assert counts[[0, 1, 3]].tolist() == [0, 0, 0]
    np.testing.assert_allclose(counts[4:] / rows, 2 / 4, atol=0.02)
    np.testing.assert_allclose(np.mean(drawn == 2, axis=0), 1 / 3, atol=0.02)
