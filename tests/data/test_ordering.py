"""The sort on disk equals sorts in memory; rows as windows on it."""

import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_in_memory import order_by_time

from tca4rec_jax import fileio
from tca4rec_jax.data import ordering
from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.ordering import sort_by_user
from tca4rec_jax.data.sequences import UNKNOWN_TIME
from tca4rec_jax.data.windows import Windows, even_parts, parts_of
from tca4rec_jax.errors import UserError


def made(count, seed, users=7, items=9, times=40, rated=False, timed=True):
    rng = np.random.default_rng(seed)
    user, item = (rng.integers(0, most, count, dtype=np.int32) for most in (users, items))
    time = rng.integers(0, times, count) if timed else np.full(count, UNKNOWN_TIME)
    rating = rng.random(count, np.float32) if rated else None
    return Interactions(user, item, time, (), rating)


def check_equal(interactions, seed, ties):
    """That files and the sort in memory have the same columns."""
    ordered = order_by_time(interactions, seed, ties)
    place_n = np.argsort(ordered.user, kind="stable")
    expected = ordered.take(place_n)
    with tempfile.TemporaryDirectory() as folder:
        found = sort_by_user(interactions, Path(folder, "sorted"), seed, ties)
        for name in ("user", "item", "timestamp", "rating"):
            column, wanted = getattr(found, name), getattr(expected, name)
            if wanted is None:
                assert column is None
            else:
                assert column.dtype == wanted.dtype
                np.testing.assert_array_equal(column, wanted)
        np.testing.assert_array_equal(found.place, place_n)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["shuffled", "numbered"]),
)
def test_the_sort_equals_the_one_in_memory(count, seed, times, rated, timed, ties):
    interactions = made(count, seed, times=times, rated=rated, timed=timed)
    check_equal(interactions, seed, ties)


@pytest.mark.parametrize("ties", ["shuffled", "numbered"])
def test_more_than_fits_into_memory_goes_to_the_disk(ties, tmp_path, monkeypatch):
    """Of one thread: several need more than a few MB each, how much depends on when they run."""
    monkeypatch.setattr(ordering, "_MEMORY", "25MB")
    monkeypatch.setattr(ordering, "_THREADS", 1)
    interactions = made(400_000, 1, users=30_000, items=3_000, times=20_000)
    check_equal(interactions, 3, ties)
    connect, no_disk = ordering.duckdb.connect, {"max_temp_directory_size": "0KB"}
    monkeypatch.setattr(
        ordering.duckdb, "connect", lambda name, config: connect(name, config=config | no_disk)
    )
    with pytest.raises(UserError, match="cannot be sorted"):
        sort_by_user(interactions, tmp_path / "sorted", 3, ties)


def test_what_cannot_be_sorted_says_why_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ordering, "_MEMORY", "1MB")
    with pytest.raises(UserError, match=f"^{tmp_path}: the interactions cannot be sorted .*disk"):
        sort_by_user(made(20_000, 1), tmp_path / "sorted")
    free = SimpleNamespace(free=20 * 100 - 1)
    monkeypatch.setattr(fileio.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match=r"the sorted interactions take .*: make room, or take a"):
        sort_by_user(made(100, 1), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def windows(tmp_path):
    interactions = made(300, 0, rated=True)
    histories = sort_by_user(interactions, tmp_path / "sorted")
    rng = np.random.default_rng(1)
    start_R = rng.integers(0, 290, 50, dtype=np.int32)
    return Windows(histories, start_R, rng.integers(1, 9, 50, dtype=np.int32), 0.5)


def test_windows_are_copies_of_what_they_point_at(windows):
    rows, of = windows.copied(), windows.histories
    for row, (start, length) in enumerate(zip(windows.start_R, windows.length_R, strict=True)):
        here, there = slice(*rows.offsets[row : row + 2]), slice(start, start + length)
        assert rows.user[row] == of.user[start]
        assert rows.items[here].tolist() == of.item[there].tolist()
        assert rows.timestamps[here].tolist() == of.timestamp[there].tolist()
        assert rows.liked[here].tolist() == (of.rating[there] > 0.5).tolist()


def test_some_of_the_windows_are_some_of_the_rows(windows):
    rows, hashed = windows.copied(), windows.copied().content_hash()
    some = np.array([3, 1, 40])
    assert windows.take(some).copied().content_hash() == rows.take(some).content_hash()
    between = rows.take(np.arange(5, 9)).content_hash()
    assert windows.between(5, 9).copied().content_hash() == between
    assert rows.between(5, 9).content_hash() == between
    assert pickle.loads(pickle.dumps(windows)).copied().content_hash() == hashed
    assert "item" not in pickle.loads(pickle.dumps(windows)).histories.__dict__


@pytest.mark.parametrize("most", [1, 7, 60, 10_000])
def test_parts_are_all_rows_in_order(windows, most):
    bounds = even_parts(windows, most)
    assert [row for bound in bounds for row in range(*bound)] == list(range(50))
    parts = [*parts_of(windows, most)]
    assert len(parts) == len(bounds) == min(50, -(-int(windows.lengths.sum()) // most))
    items = np.concatenate([part.items for part in parts])
    assert items.tolist() == windows.copied().items.tolist()


@pytest.mark.parametrize(
    ("number", "handler", "raised"),
    [
        (signal.SIGTERM, lambda *_: sys.exit(143), SystemExit),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_a_signal_within_a_query_raises_what_its_handler_does(tmp_path, number, handler, raised):
    previous = signal.signal(number, handler)
    try:
        with pytest.raises(raised):
            _signalled_query(tmp_path / "sorted", number)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)


def _signalled_query(folder, number):
    """A second's work: a query that DuckDB's own threads run hears of a signal at its end."""
    with ordering._database(folder) as database:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        database.execute("SELECT count(*) FROM range(2_000_000_000)").fetchall()
        time.sleep(1)  # where the query was over before the signal came
