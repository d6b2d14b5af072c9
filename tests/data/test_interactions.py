"""Reading interactions and items."""

import numpy as np
import pandas as pd
import pytest

from tca4rec_jax.data import interactions
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import (
    Interactions,
    read_interactions,
    read_items,
    read_items_without_titles,
    treat_duplicates,
)
from tca4rec_jax.data.tables import Reading
from tca4rec_jax.errors import UserError

CATALOGUE = Catalogue(("a", "b", "c"), ("Apple", "Bean", "Cherry"))
ROWS = pd.DataFrame({"user": ["u", "v", "u"], "item": ["b", "a", "c"], "timestamp": [30, 10, 20]})
COLUMNS = {name: name for name in ROWS}
A_TIME = "expected a time since 1970"
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
        ("timestamp", [1.0, np.nan, 2.0], f"row 2: timestamp is None, {A_TIME}"),
        ("timestamp", pd.array([1, None, 2], "Int64"), f"row 2: timestamp is None, {A_TIME}"),
        ("timestamp", pd.to_datetime(["2020-01-02", None, "2020-01-01"]), f"row 2: .*{A_TIME}"),
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
    (tmp_path / "x.txt").write_text("{}")
    with pytest.raises(ValueError, match="must end in one of"):
        read_interactions(tmp_path / "x.txt", CATALOGUE, COLUMNS)


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


PAIRS = {"user": "user", "item": "item"}


def test_sequences_and_titles_are_read_from_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"v": [7, "b"], "none": [], "u": ["b", "7", "b"]}')
    catalogue = read_items_without_titles(path, PAIRS)
    assert catalogue == Catalogue(("7", "b"), ("7", "b"))
    read = read_interactions(path, catalogue, PAIRS)
    assert (read.user_ids, read.user.tolist()) == (("v", "u"), [0, 0, 1, 1, 1])
    assert read.item.tolist() == [0, 1, 1, 0, 1]
    assert not read.has_times
    assert treat_duplicates(read, drop=True) is read
    titles = tmp_path / "titles.json"
    titles.write_text('{"b": "Two  words", "7": "Se7en"}')
    assert read_items(titles, ITEM_COLUMNS) == Catalogue(("b", "7"), ("Two words", "Se7en"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"u": ["a", "z"]}', r"value 2 of the user 'u': 1 items are not in .* such as \['z'\]"),
        ('{"u": ["a"], "v": ["b", ""]}', "value 2 of the user 'v': item is '', expected an id"),
        ('{"u": ["a"], " ": ["b"]}', "value 1 of the user ' ': user is ' ', expected an id"),
        ('{"u": ["a", null]}', "value 2 of 'u' is None, expected text or a whole number"),
        ('{"u": [1.0]}', "value 1 of 'u' is 1.0, expected text"),
        ('{"u": [["a"]]}', r"value 1 of 'u' is \['a'\], expected text"),
        ('{"u": true}', "value 1 of 'u' is True, expected text"),
        ('{"u": ["a"], "u": ["b"]}', "is not JSON: a name occurs twice in an object: 'u'"),
        ('[["a"]]', "expected one JSON object"),
        ('{"u": ["a"', "is not JSON"),
        ("{}", "has no values"),
    ],
)
def test_bad_sequences_are_refused_naming_the_user(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"x.json.*{message}"):
        read_interactions(path, CATALOGUE, PAIRS)


def test_json_has_two_columns_and_bad_titles_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "Apple", "b": " "}')
    with pytest.raises(UserError, match="value 1 of the item 'b': title is ' ', expected a title"):
        read_items(path, ITEM_COLUMNS)
    kept = read_items(path, ITEM_COLUMNS, reading=Reading(drop_invalid=True))
    assert kept.item_ids == ("a",)
    with pytest.raises(UserError, match="keys and values, not user, item, timestamp"):
        read_interactions(path, CATALOGUE, COLUMNS)


@pytest.mark.parametrize("seed", range(4))
def test_duplicates_are_those_that_pandas_finds(seed, monkeypatch):
    monkeypatch.setattr(interactions, "_PART", 64)
    columns = np.random.default_rng(seed).integers(0, 12 - 3 * seed, (3, 500)).astype(np.int32)
    expected = pd.DataFrame(columns.T).duplicated()
    user, item, timestamp = columns
    given = Interactions(user, item, timestamp.astype(np.int64))
    kept = treat_duplicates(given, drop=True)
    assert _triples(kept) == [
        triple for triple, twice in zip(_triples(given), expected, strict=True) if not twice
    ]
    all_equal = lambda columns, part: np.zeros(len(columns[0][part]), np.uint64)  # noqa: E731
    monkeypatch.setattr(interactions, "_hash", all_equal)
    assert _triples(treat_duplicates(given, drop=True)) == _triples(kept)
