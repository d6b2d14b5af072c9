"""Tables are read as a strict reader of RFC 4180 does, or refused in one line with a place."""

import gzip
import random
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from tca4rec_jax.data import parquet_columns
from tca4rec_jax.data.tables import BadRows, read_table
from tca4rec_jax.errors import UserError

NAMES = {name: name for name in ("item", "title", "timestamp")}
PLACE = r"(row|line) \d+|has no column|more than one column|is empty|no rows|cannot be read"

COLUMNS = {"item": ["a", "b"], "title": ["Heat", "Up"], "timestamp": [1, 2]}


def read(path):
    """The rows of a table: (item, title, timestamp)."""
    table = read_table(path, NAMES)
    columns = table.ids("item"), table.titles("title"), table.times("timestamp").tolist()
    return list(zip(*columns, strict=True))


def rows_or_error(path):
    """What `read` returns, or says in a UserError."""
    try:
        return read(path)
    except UserError as error:
        return str(error)


def records(text, separator):
    """The records of RFC 4180, character by character; ValueError where the rules are broken."""
    found, row, at = [], [], 0
    while at < len(text):
        if not row and text[at] in "\r\n":  # an empty line
            at += 1
            continue
        if text[at] == '"':
            end = at + 1
            while text[end : end + 1] != '"' or text[end + 1 : end + 2] == '"':
                if end >= len(text):
                    raise ValueError("open quote")
                end += 2 if text[end] == '"' else 1
            field, at = text[at + 1 : end].replace('""', '"'), end + 1
        else:
            end = at
            while end < len(text) and text[end] not in separator + '\r\n"':
                end += 1
            field, at = text[at:end], end
        row.append(field)
        if at < len(text) and text[at] == separator:
            at += 1
            if at == len(text):
                row.append("")
        elif at == len(text) or text[at] in "\r\n":
            at += 2 if text[at : at + 2] == "\r\n" else 1
            found.append(row)
            row = []
        else:
            raise ValueError("a quote inside a field, or text after one")
    return [*found, *([row] if row else [])]


def oracle(data, separator):
    """What `read` should return, or None for a table that it should refuse."""
    try:
        header, *rows = records(data.decode("utf-8-sig"), separator)
    except ValueError:
        return None
    if b"\0" in data or not rows or {*map(len, rows)} != {len(header)}:
        return None
    if any(header.count(name) != 1 for name in NAMES):
        return None
    found = []
    for row in rows:
        item, title, time = (row[header.index(name)].strip() for name in NAMES)
        control = any(ord(c) < 32 and c != "\t" or ord(c) == 127 for c in item + title)
        if (
            not item
            or not title
            or control
            or "\t" in item
            or not re.fullmatch(r"\d{1,18}(\.0*)?", time)
        ):
            return None
        if re.fullmatch(r"[+-]?\d(\.\d+[eE]\+?|[eE]\+)\d+", item):
            return None
        found.append((item, " ".join(title.split()), int(float(time))))
    whole = {item for item, *_ in found}
    gaps = (item.rpartition(".") for item in whole if re.fullmatch(r"-?\d+\.0+", item))
    return None if any(digits in whole for digits, *_ in gaps) else found


def valid_table(rng, separator):
    """A few rows whose fields are quoted where they must be and sometimes where they need not."""
    columns = rng.sample([*NAMES, "note"], 4)
    rows = [columns]
    for number in range(rng.randint(1, 5)):
        words = rng.choices(['"Heat"', "Alien, the", "Amélie", "12\ttracks", "x" * 30], k=2)
        values = {"item": f"i{number}", "title": " ".join(words), "timestamp": str(number)}
        rows.append([{**values, "note": "two\nlines" if number % 2 else ""}[c] for c in columns])

    def field(text):
        quoted = rng.random() < 0.2 or any(c in text for c in separator + '"\r\n')
        return '"' + text.replace('"', '""') + '"' if quoted else text

    end = rng.choice(["\n", "\r\n"])
    return end.join(separator.join(map(field, row)) for row in rows) + rng.choice(["", end])


def mutated(rng, data):
    """Cut, or with bytes or lines put in, taken out, changed or swapped."""
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at, to = sorted(rng.choices(range(len(data) + 1), k=2))
        put = rng.choice(
            [b'"', b'""', b'\\"', b",", b"\t", b"\n", b"\r", b"\0", b"\xe9", b"7.0", b" "]
        )
        data = rng.choice(
            [
                data[:at] + put + data[at:],
                data[:at] + put + data[at + 1 :],
                data[:at],
                data[:at] + data[to:],
                data[:at] + data[at:to] * 2 + data[to:],
                b"\n".join(rng.sample(lines := data.split(b"\n"), len(lines))),
            ]
        )
    return data


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_mutated_text_is_read_as_the_oracle_reads_it_or_refused(tmp_path, suffix, separator):
    rng, outcomes = random.Random(0), []
    path = tmp_path / f"mutated.{suffix}"
    for _ in range(300):
        data = mutated(rng, valid_table(rng, separator).encode())
        path.write_bytes(data)
        expected = oracle(data, separator)
        outcomes.append(expected is None)
        found = rows_or_error(path)
        if expected is None:
            assert re.fullmatch(rf"{re.escape(str(path))}.*({PLACE}).*", found), (found, data)
        else:
            assert found == expected, data
    assert 0.3 < np.mean(outcomes) < 0.8


def test_mutated_parquet_is_read_as_it_was_or_refused(tmp_path):
    rng, path, refused = random.Random(0), tmp_path / "mutated.parquet", 0
    rows = [(f"i{number}", f"Title {number}", number) for number in range(5)]
    columns = zip(NAMES, zip(*rows, strict=True), strict=True)
    pa.parquet.write_table(
        pa.table({n: list(c) for n, c in columns}), path, write_page_checksum=True
    )
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutated(rng, whole))
        found = rows_or_error(path)
        assert found == rows or re.fullmatch(rf"{re.escape(str(path))}.*", found)
        refused += found != rows
    assert refused > 50


def parquet(tmp_path, **changes):
    columns = {**COLUMNS, **changes}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (
            "csv",
            "1,Matrix, The,5\n2,Up,6\n",
            r"row 1 has 4 fields, the header 3: '1,Matrix.*quotes",
        ),
        ("csv", "1,Up,6\n2,Heat\n", "row 2 has 2 fields, the header 3"),
        ("csv", '1,"Weird Al,5\n2,Heat,6\n3,"Up,7\n', "line 2: .*begins with '\"Weird Al"),
        ("tsv", '1\t"Weird Al\t5\n2\tHeat\t6\n3\t"Up\t7\n', "line 2: the quotes of the field"),
        ("csv", '1,"Weird Al,5\n2,Heat",6\n', "row 1: title is .*, expected a title in one line"),
        ("csv", '1,Up,4\n2,"The \\"Real\\" Thing",5\n', "line 3: .* every quote in it twice"),
        ("csv", '1,2\\" vinyl,5\n', "line 2: the quotes of the field"),
        ("csv", "1,Up\0,5\n", "line 2: a NUL"),
        (
            "csv",
            "1,Up,5\n1.23457E+12,Up,6\n",
            r"row 2: item is '1\.23457E\+12', expected the whole id",
        ),
        ("csv", "7,Up,5\n8,Up,6\n7.0,Up,6\n", r"row 3: item is '7\.0', expected one form"),
        (
            "csv",
            "1,Up,1600000000\n2,Up,1600000000000\n3,Up,1600000001\n",
            "row 2: .*expected seconds",
        ),
        ("csv", "1,Up,2024-05-31\n2,Up,1717113600\n", "row 2: .*expected a date and time"),
        ("csv", "1,Up,2024-05-31T10:00Z\n2,Up,2024-05-31 10:00\n", "row 2: .*with a zone or none"),
        ("csv", "1,Up,2024-05-31\n2,Up,2024-02-31\n", "row 2: timestamp is '2024-02-31'"),
        ("csv", "1,Up,1969-01-01\n2,Up,2024-02-03\n", "row 1: .*since 1970"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, suffix, text, message):
    path = tmp_path / f"x.{suffix}"
    header = ("\t" if suffix == "tsv" else ",").join(NAMES)
    path.write_text(f"{header}\n{text}")
    with pytest.raises(UserError, match=rf"x\.{suffix}, {message}"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": pd.Categorical(["x", None])}, "row 2: title is None, expected a title"),
        ({"title": [["Heat"], ["Up"]]}, "the column title holds list<"),
        ({"title": [300.5, 21.0]}, "row 1: title is 300.5, expected text or a whole number"),
        ({"title": [b"Up", b"Caf\xe9"]}, r"row 2: title is b'Caf\\xe9', expected text in UTF-8"),
        ({"title": pa.array([None, None])}, "row 1: title is None"),
        ({"item": [True, False]}, "the column item holds bool"),
        ({"item": [1.0, np.inf]}, "row 2: item is inf"),
        (
            {"item": [1.0, 2.0**53]},
            r"row 2: item is 9007199254740992\.0, expected .* below 2\*\*53",
        ),
        ({"item": np.array([1, 2**24], np.float32)}, r"row 2: .*below 2\*\*24, from where float "),
        ({"item": pd.to_datetime(["2020-01-01"] * 2)}, r"the column item holds timestamp\["),
        ({"timestamp": [True, False]}, "the column timestamp holds bool"),
        (
            {"timestamp": pa.array([2**63, 1], pa.uint64())},
            "row 1: timestamp is 9223372036854775808",
        ),
    ],
)
def test_columns_of_other_types_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"x\.parquet(, |: ){message}"):
        read(parquet(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"title": pd.Categorical(["Heat", "Up"])}, "Heat"),
        ({"title": [b"Caf\xc3\xa9", b"Up"]}, "Café"),
        ({"title": [300.0, 21.0]}, "300"),
        ({"title": pa.array([300, 21], pa.decimal128(5, 2))}, "300"),
        ({"title": pa.array([2**64 - 1, 1], pa.uint64())}, str(2**64 - 1)),
    ],
)
def test_columns_of_other_types_are_read_as_text(tmp_path, changes, expected):
    assert read(parquet(tmp_path, **changes))[0][1] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["Acme", None], ("Acme", "")),
        (pa.array([1995, None], pa.int32()), ("1995", "")),
        ([["Up", "Heat"], None], ("Up, Heat", "")),
    ],
)
def test_attributes_may_be_missing_or_lists(tmp_path, values, expected):
    table = read_table(parquet(tmp_path, brand=values), {"brand": "brand"})
    assert table.attributes(["brand"]) == {"brand": expected}


def test_dates_are_microseconds(tmp_path):
    days = pa.array([1, 2], pa.date32())
    assert [time for *_, time in read(parquet(tmp_path, timestamp=days))] == [86400e6, 2 * 86400e6]
    path = tmp_path / "x.csv"
    path.write_text("item,title,timestamp\na,Up,1970-01-02\nb,Up,1970-01-02T02:00:00.5+01:00\n")
    with pytest.raises(UserError, match="all with a zone or none"):
        read(path)
    path.write_text(path.read_text().replace("02\n", "02T00:00Z\n", 1))
    assert [time for *_, time in read(path)] == [86400e6, 90000.5e6]


def test_other_encodings_and_compressed_files(tmp_path):
    text = "item,title,timestamp\na,Up,1\nb,Amélie,2\n"
    expected = [("a", "Up", 1), ("b", "Amélie", 2)]
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(
        UserError, match=r"x\.csv, line 3: byte 0xe9 is not utf-8; .*data\.encoding"
    ):
        read(path)
    for encoding in ("cp1252", "utf-16", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        table = read_table(path, NAMES, "utf-8" if encoding == "utf-8-sig" else encoding)
        assert table.titles("title").tolist() == ["Up", "Amélie"]
    with pytest.raises(UserError, match="unknown encoding: cp12"):
        read_table(path, NAMES, "cp12")
    compressed = tmp_path / "x.csv.gz"
    compressed.write_bytes(gzip.compress(text.encode()))
    assert read(compressed) == expected
    compressed.write_bytes(compressed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"x\.csv\.gz cannot be read"):
        read(compressed)


def test_json_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    line = '{"item": %s, "title": "Up", "timestamp": %d}\n'
    path.write_text(line % (7, 1) + "\n" + line % (2**53 + 1, 2))
    assert read(path) == [("7", "Up", 1), (str(2**53 + 1), "Up", 2)]
    for item, message in (('"x"', "row 2: item is 'x'"), (2**70, "row 2"), ("[1]", "row 2")):
        path.write_text(line % (7, 1) + line % (item, 2))
        with pytest.raises(UserError, match=message):
            read(path)
    path.write_text(line % (7, 1) + '{"title": "Up", "timestamp": 2}\n')
    with pytest.raises(UserError, match="row 2: item is None, expected an id"):
        read(path)
    path.write_text(line % (7, 1) + '{"item": "b", "item": "a"}\n')
    with pytest.raises(UserError, match="line 2 is not JSON: a name occurs twice"):
        read(path)
    path.write_text(line % (7, 1) + "{" * 100_000)
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read(path)


def test_column_names_that_occur_twice_are_refused_if_they_are_read(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("item,title,timestamp,note,note\na,Up,1,,\n")
    assert read(path) == [("a", "Up", 1)]
    path.write_text("item,title,timestamp,title\na,Up,1,Heat\n")
    with pytest.raises(UserError, match="more than one column 'title'"):
        read(path)


def test_columns_of_a_parquet_file_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_ROWS", 2)
    columns = {
        "a": np.arange(7, dtype=np.int16),
        "b": [5, 4, None, 2, 1, None, 9],
        "c": [*"xyxyzzz"],
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=3)
    table = read_table(tmp_path / "x.parquet", {"first": "a", "second": "b", "third": "c"})
    assert {*table.columns} == {"first", "second", "third"}
    assert table.integers("first").tolist() == [*range(7)]
    code_n, ids = table.codes("third")
    assert ids[code_n].tolist() == columns["c"]
    with pytest.raises(
        BadRows, match=r"row 3: b is None, expected .* \(2 such rows of 7\)"
    ) as error:
        table.codes("second")
    assert np.flatnonzero(error.value.bad_n).tolist() == [2, 5]
    assert table.without(error.value.bad_n).integers("second").tolist() == [5, 4, 2, 1, 9]
