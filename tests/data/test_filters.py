"""Filters against plain Python; every one counts what it left."""

import json
import random
import tracemalloc
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_raw import steps_of

from tca4rec_jax.data import filters as filters_of_data
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.data.filters import Filters, Report, Step, core, filtered, only_used
from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.sequences import UNKNOWN_TIME
from tca4rec_jax.errors import UserError

DAY = 86400
FIRST = 1_300_000_000 // DAY * DAY


def interactions(rows, unit=1):
    """Of (user, item, time, rating)."""
    user, item, time, rating = np.array(rows, np.int64).reshape(-1, 4).T
    users = tuple(f"u{number}" for number in range(9))
    kinds = user.astype(np.int32), item.astype(np.int32), time * unit, users
    return Interactions(*kinds, rating.astype(np.float32))


def rows_of(found, unit=1):
    columns = found.user, found.item, found.timestamp // unit, found.rating.astype(int)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def core_of(rows, user_core, item_core):
    """One interaction after another is taken out until none has to be."""
    rows = list(rows)
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        bad = [row for row in rows if users[row[0]] < user_core or items[row[1]] < item_core]
        if not bad:
            return rows
        rows.remove(bad[0])


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9), st.integers(1, 5)),
    min_size=1,
    max_size=50,
)


def rows_of_core(rows, user_core, item_core):
    given = interactions(rows)
    return rows_of(given.take(core(given.user, given.item, user_core, item_core)))


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 3, 7, 1 << 20]))
def test_the_core_is_the_largest(rows, user_core, item_core, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters_of_data, "_PART", at_once)
        assert rows_of_core(rows, user_core, item_core) == core_of(rows, user_core, item_core)


def test_a_core_takes_several_rounds():
    chain = [(user, item, 0, 1) for user in range(5) for item in (user, user + 1)]
    rows = [*chain, *((8, item, 0, 1) for item in (7, 8)), *((7, item, 0, 1) for item in (7, 8))]
    assert rows_of_core(rows, 2, 2) == rows[-4:]  # the chain goes link by link


def made(seed=0, count=200):
    choose = random.Random(seed)
    return [
        (choose.randrange(9), choose.randrange(12), FIRST + choose.randrange(30) * DAY)
        + (choose.randint(1, 5),)
        for _ in range(count)
    ]


@pytest.mark.parametrize("unit", [1, 1000, 10**6, 10**9])
def test_ratings_and_windows(unit):
    rows = made()
    date = datetime.fromtimestamp(FIRST + 5 * DAY, UTC).date().isoformat()
    end = datetime.fromtimestamp(FIRST + 28 * DAY, UTC).isoformat()
    filters, report = Filters(min_rating=3, since=date, before=end, last_days=10), Report()
    expected = [row for row in rows if row[3] >= 3]
    expected = [row for row in expected if FIRST + 5 * DAY <= row[2] < FIRST + 28 * DAY]
    last = max(row[2] for row in expected)
    expected = [row for row in expected if row[2] > last - 10 * DAY]
    assert 10 < len(expected) < len(rows) / 2
    assert rows_of(filtered(interactions(rows, unit), filters, report), unit) == expected
    users, items = ({row[column] for row in expected} for column in (0, 1))
    assert [step.step.partition("=")[0] for step in report.steps] == [
        *("data.filters.min_rating", "data.filters.since"),
        *("data.filters.before", "data.filters.last_days"),
    ]
    assert report.steps[-1][1:] == (len(users), len(items), len(expected))


def test_frequent_items_and_drawn_users():
    rows = made()
    counts = Counter(row[1] for row in rows)
    frequent = sorted(counts, key=lambda item: (-counts[item], item))[:4]
    found = rows_of(filtered(interactions(rows), Filters(max_items=4), Report()))
    assert found == [row for row in rows if row[1] in frequent]
    draws = [
        filtered(interactions(rows), Filters(max_users=3, seed=seed), Report())
        for seed in (0, 0, 1, 2)
    ]
    drawn = [frozenset(found.user.tolist()) for found in draws]
    assert [len(users) for users in drawn] == [3] * 4
    assert drawn[0] == drawn[1]
    assert len({*drawn}) > 1
    assert rows_of(draws[0]) == [row for row in rows if row[0] in drawn[0]]


def test_filters_hold_little_more_than_what_was_and_what_is_left(monkeypatch):
    monkeypatch.setattr(filters_of_data, "_PART", 1 << 14)
    count = 200_000
    rng = np.random.default_rng(0)
    user, item = (rng.integers(0, 5000, count, np.int32) for _ in range(2))
    columns = [user, item, FIRST + np.arange(count)]
    filters = Filters(since=datetime.fromtimestamp(FIRST + 9, UTC).isoformat(), user_core=40)
    tracemalloc.start()
    handed_over = [Interactions(*map(np.copy, columns))]
    before, _ = tracemalloc.get_traced_memory()
    left = filtered(handed_over.pop(), filters, Report())
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count / 4 < len(left.user) < count * 3 / 4
    assert after < before * 3 / 4
    assert peak < (2 * 16 + 4) * count  # twice an interaction, and flags


def test_by_default_everything_is_kept_and_the_seed_alone_is_no_filter():
    report, given = Report(), interactions(made())
    assert filtered(given, Filters(seed=3), report) is given
    assert not report.steps
    assert not Filters(seed=3).on
    assert Filters(before="2020-01-01").on


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_rating": 9}, "no interaction is left after data.filters.min_rating=9"),
        ({"user_core": 99}, "no interaction is left after data.filters.user_core=99, item_core=0"),
        ({"since": "2012"}, "data.filters.since is '2012': expected a date such as 2016-10-01"),
        ({"last_days": -1}, "data.filters.last_days is -1: expected at least 0"),
    ],
)
def test_what_leaves_nothing_or_is_no_setting_is_refused(filters, message):
    with pytest.raises(UserError, match=message):
        filtered(interactions(made()), Filters(**filters), Report())


def test_windows_need_times_of_a_known_unit():
    given = interactions([(0, 0, 5, 1)])
    with pytest.raises(UserError, match="the latest time is 5: a window of time needs seconds"):
        filtered(given, Filters(last_days=1), Report())
    given.timestamp[:] = UNKNOWN_TIME
    with pytest.raises(UserError, match="data.filters.since, before and last_days need times"):
        filtered(given, Filters(since="2020-01-01"), Report())


def test_only_used_items_and_users_are_left_in_their_order():
    catalogue = Catalogue(("b", "a", "c"), ("B", "A", "C"), {"brand": ("x", "y", "z")})
    kept, found = only_used(catalogue, interactions([(4, 2, 0, 1), (2, 0, 0, 1), (4, 0, 1, 1)]))
    assert kept == Catalogue(("b", "c"), ("B", "C"), {"brand": ("x", "z")})
    assert found.user_ids == ("u2", "u4")
    assert (found.user.tolist(), found.item.tolist()) == ([1, 0, 1], [1, 0, 0])


def test_filters_are_part_of_the_data_and_their_counts_of_the_statistics(tmp_path):
    rows = made()
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"{i},T{i}\n" for i in range(20)))
    lines = [f"{user},{item},{time},{rating}\n" for user, item, time, rating in rows]
    (tmp_path / "rows.csv").write_text("user,item,timestamp,stars\n" + "".join(lines))
    config = {"source": "files", "history_length": 2, "rating_column": "stars"}
    config |= {"catalogue": str(tmp_path / "items.csv"), "interactions": str(tmp_path / "rows.csv")}
    filters = {"min_rating": 2.0, "user_core": 3, "item_core": 12}
    data = prepare({**config, "filters": filters}, tmp_path / "data")
    expected = core_of([row for row in rows if row[3] >= 2], 3, 12)
    used = sorted({str(row[1]) for row in expected}, key=int)
    assert data.catalogue.item_ids == tuple(used)
    assert 3 < len(used) < 12
    counts = len({row[0] for row in expected}), len(used), len(expected)
    step = Step("data.filters.user_core=3, item_core=12", *counts)
    assert steps_of(tmp_path / "data")[-1] == step._asdict()
    written = json.loads((tmp_path / "data" / "statistics.json").read_text())
    assert written["items"] == len(used)
    assert written["splits"]["test"]["rows"] == len(data.splits["test"])
    with pytest.raises(UserError, match=r"data\.filters\.user_core"):
        prepare({**config, "filters": {**filters, "user_core": 4}}, tmp_path / "data")
    assert len(prepare(config, tmp_path / "all").catalogue.item_ids) == 20
    assert steps_of(tmp_path / "all") == [Step("in the file", 9, 12, 200)._asdict()]
