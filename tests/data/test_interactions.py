"""Reading interactions and items, their order, and the splits against a plain Python oracle."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import (
    Interactions,
    build_splits,
    order_by_time,
    read_interactions,
    read_items,
    treat_duplicates,
)
from tca4rec_jax.data.tables import Reading

CATALOGUE = Catalogue(("a", "b", "c"), ("Apple", "Bean", "Cherry"))
ROWS = pd.DataFrame({"user": ["u", "v", "u"], "item": ["b", "a", "c"], "timestamp": [30, 10, 20]})
COLUMNS = {name: name for name in ROWS}
ITEM_COLUMNS = {"item": "item", "title": "title"}


def _write(frame, path):
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(
        path, index=False, sep="\t" if path.suffix == ".tsv" else ","
    )
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_interactions_are_read_from_every_format(tmp_path, suffix):
    read = read_interactions(_write(ROWS, tmp_path / f"x{suffix}"), CATALOGUE, COLUMNS)
    assert read.user.tolist() == [0, 1, 0]
    assert read.item.tolist() == [1, 0, 2]
    assert read.timestamp.tolist() == [30, 10, 20]
    assert (read.user.dtype, read.item.dtype, read.timestamp.dtype) == (
        np.int32,
        np.int32,
        np.int64,
    )


def test_column_names_can_be_chosen(tmp_path):
    names = {"user": "reviewer", "item": "asin", "timestamp": "when"}
    path = _write(ROWS.rename(columns=names), tmp_path / "x.csv")
    assert read_interactions(path, CATALOGUE, names).item.tolist() == [1, 0, 2]


def test_recbole_files_are_read(tmp_path):
    path = tmp_path / "x.inter"
    path.write_text('user_id:token\titem_id:token\ttimestamp:float\n"u\tb\t881250949\n')
    names = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}
    assert read_interactions(path, CATALOGUE, names).timestamp.tolist() == [881250949]


def test_whole_numbers_are_ids_and_dates_are_times_in_parquet(tmp_path):
    catalogue = Catalogue(("7", "8"), ("Apple", "Bean"))
    frame = pd.DataFrame(
        {
            "user": [1, 1],
            "item": [8.0, 7.0],
            "timestamp": pd.to_datetime(["2020-01-02", "2020-01-01"], utc=True),
        }
    )
    read = read_interactions(_write(frame, tmp_path / "x.parquet"), catalogue, COLUMNS)
    assert read.item.tolist() == [1, 0]
    assert read.timestamp[0] - read.timestamp[1] == 24 * 3600 * 10**6


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "item",
            ["b", "z", "z"],
            r"row 2: 1 items are not in the catalogue of 3, such as \['z'\]",
        ),
        ("item", ["b", "", "c"], "row 2: item is '', expected an id"),
        ("user", ["u", "v", ""], "row 3: user is '', expected an id"),
        ("timestamp", [30, -10, 20], "row 2: timestamp is '-10', expected a whole number"),
        ("timestamp", [30, 10, "nan"], "row 3: timestamp is 'nan'"),
        ("timestamp", ["", 10, 20], "row 1: timestamp is ''"),
        ("timestamp", ["30", "yesterday", "20"], "row 2: timestamp is 'yesterday'"),
        ("timestamp", [30, 10.5, 20], "row 2: timestamp is '10.5'"),
        ("timestamp", [30, 10, "inf"], "row 3: timestamp is 'inf'"),
    ],
)
def test_bad_rows_are_named(tmp_path, column, values, message):
    path = _write(ROWS.assign(**{column: values}), tmp_path / "x.csv")
    with pytest.raises(ValueError, match=f"x.csv, {message}"):
        read_interactions(path, CATALOGUE, COLUMNS)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("timestamp", [1.0, np.nan, 2.0], "row 2: timestamp is None"),
        ("timestamp", pd.to_datetime(["2020-01-02", None, "2020-01-01"]), "row 2: .* a date"),
        ("item", ["a", None, "b"], "row 2: item is .*, expected an id"),
        ("item", [1.5, 2.0, 3.0], "row 1: item is 1.5, expected text or a whole number"),
    ],
)
def test_bad_parquet_rows_are_named(tmp_path, column, values, message):
    path = _write(ROWS.assign(**{column: values}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_interactions(path, CATALOGUE, COLUMNS)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    path = _write(ROWS.rename(columns={"timestamp": "time"}), tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"no column \['timestamp'\].*'user', 'item', 'time'"):
        read_interactions(path, CATALOGUE, COLUMNS)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        read_interactions(tmp_path / "none.csv", CATALOGUE, COLUMNS)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="empty.csv is empty"):
        read_interactions(tmp_path / "empty.csv", CATALOGUE, COLUMNS)
    (tmp_path / "header.csv").write_text("user,item,timestamp\n")
    with pytest.raises(ValueError, match="header.csv has a header but no rows"):
        read_interactions(tmp_path / "header.csv", CATALOGUE, COLUMNS)
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="x.parquet cannot be read as a Parquet file"):
        read_interactions(tmp_path / "x.parquet", CATALOGUE, COLUMNS)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="must end in one of"):
        read_interactions(tmp_path / "x.json", CATALOGUE, COLUMNS)


def test_items_keep_the_order_of_the_file_and_titles_are_cleaned_and_cut(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('item,title\nz,"  Two\t words "\na,NA\n')
    catalogue = read_items(path, ITEM_COLUMNS)
    assert catalogue.item_ids == ("z", "a")
    assert catalogue.titles == ("Two words", "NA")
    assert read_items(path, ITEM_COLUMNS, max_title_length=4).titles == ("Two", "NA")
    with pytest.raises(ValueError, match="max_title_length is -3: expected at least 0"):
        read_items(path, ITEM_COLUMNS, max_title_length=-3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,Apple\nb,  \n", r"items.csv, row 2: title is '  ', expected a title"),
        (
            "a,Apple\nb,Bean\na,Again\n",
            "items.csv, row 3: item is 'a', expected an id that no earlier",
        ),
        ("a,Apple\n,Bean\n", r"items.csv, row 2: item is '', expected an id"),
    ],
)
def test_bad_items_are_named(tmp_path, rows, message):
    (tmp_path / "items.csv").write_text("item,title\n" + rows)
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / "items.csv", ITEM_COLUMNS)


def test_rows_that_cannot_be_used_are_left_out_on_request(tmp_path, caplog):
    path = tmp_path / "items.csv"
    path.write_text("item,title\na,Apple\nb,\na,Again\n,Bean\nc,Cherry\n")
    catalogue = read_items(path, ITEM_COLUMNS, reading=Reading(drop_invalid=True))
    assert catalogue == Catalogue(("a", "c"), ("Apple", "Cherry"))
    assert [note.partition(":")[0] for note in caplog.messages] == ["Dropped 1 rows"] * 3
    assert "items.csv, row 3: item is 'a'" in caplog.messages[2]  # its row in the file
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp\nu,a,1\nu,b,2\nv,c,\nv,a,9\n")
    read = read_interactions(path, catalogue, COLUMNS, Reading(drop_invalid=True))
    assert (read.user_ids, read.timestamp.tolist()) == (("u", "v"), [1, 9])
    path.write_text("user,item,timestamp\nu,z,1\n")
    with pytest.raises(ValueError, match="row 1: 1 items are not in"):
        read_interactions(path, catalogue, COLUMNS, Reading(drop_invalid=True))


def test_exact_duplicates_are_counted_or_dropped(caplog):
    given = _interactions([(0, 1, 5), (0, 1, 6), (0, 1, 5), (1, 1, 5), (0, 1, 5)])
    assert treat_duplicates(given, drop=False) is given
    assert _triples(treat_duplicates(given, drop=True)) == [(0, 1, 5), (0, 1, 6), (1, 1, 5)]
    count = "2 of 5 interactions are exact duplicates: "
    kept = "kept (data.drop_duplicates=true drops them)"
    assert caplog.messages == [count + kept, count + "dropped"]


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
    built = build_splits(
        interactions, history_length=history_length, min_history=min_history, split=split, seed=3
    )
    ordered = _triples(order_by_time(interactions, 3))
    expected = _oracle(ordered, history_length, min_history or history_length, split)
    for name, sequences in built.items():
        bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
        rows = [
            (
                int(sequences.user[r]),
                list(
                    zip(
                        sequences.items[a:b].tolist(),
                        sequences.timestamps[a:b].tolist(),
                        strict=True,
                    )
                ),
            )
            for r, (a, b) in enumerate(bounds)
        ]
        assert rows == expected[name], name


def test_nothing_of_training_is_later_than_validation_and_test():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, 5, 200), rng.integers(0, 9, 200), rng.permutation(200)], 1)
    built = build_splits(_interactions(triples), history_length=4)
    target_times = {name: s.timestamps[s.last_positions] for name, s in built.items()}
    assert built["train_sequences"].timestamps.max() < target_times["validation"].min()
    assert target_times["train"].max() < target_times["validation"].min()
    assert target_times["validation"].max() < target_times["test"].min()


def test_one_user_of_one_moment_has_rows():
    splits = build_splits(_interactions([(0, item, 5) for item in range(10)]), history_length=2)
    assert all(len(rows) for rows in splits.values())
    assert splits["test"].tied.all()


def test_settings_that_leave_no_rows_are_refused():
    interactions = _interactions([(0, item, item) for item in range(10)])
    message = "0 interactions have 11 or more of their user before them"
    with pytest.raises(ValueError, match=message):
        build_splits(interactions, history_length=11)
