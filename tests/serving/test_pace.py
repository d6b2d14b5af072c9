"""How large a batch may be, and how many may wait, by the time that batches took."""

import pytest

from tca4rec_jax.serving.pace import Pace


def pace_of(**seconds_of):
    return Pace({int(size[1:]): seconds for size, seconds in seconds_of.items()})


def test_a_size_takes_what_it_took_or_what_smaller_ones_promise():
    pace = pace_of(_4=2.0, _16=5.0)
    assert pace.seconds(16) == 5.0
    assert pace.seconds(64) == 20.0
    assert pace.seconds(1) == 2.0
    assert Pace({}).seconds(4) == 0.0
    once_slow = pace_of(_4=0.1, _16=50.0)
    assert once_slow.seconds(16) == pytest.approx(0.4)  # it is tried again


def test_the_newest_batches_count_most():
    pace = pace_of(_4=10.0)
    for _ in range(20):
        pace.learn(4, 2.0)
    assert 2.0 < pace.seconds(4) < 2.1


def test_the_largest_size_leaves_three_quarters_of_the_time():
    sizes = (1, 4, 16, 64)
    assert Pace({}).largest(sizes, 1e9) == 1  # the first says how fast it is
    pace = pace_of(_1=0.5, _4=1.5)
    assert [pace.largest(sizes, allowed) for allowed in (0.1, 2, 5.9, 6, 23, 24, 96)] == [
        1, 1, 1, 4, 4, 16, 64,
    ]  # fmt: skip


def test_rows_wait_for_whole_batches_and_one_that_is_as_small_as_may_be():
    pace = pace_of(_1=0.5, _4=2.0, _16=5.0)
    waits = [pace.wait(rows, (1, 4, 16), allowed=8.0) for rows in (0, 1, 2, 4, 5, 12)]
    assert waits == [0, 0.5, 2, 2, 2.5, 6]
