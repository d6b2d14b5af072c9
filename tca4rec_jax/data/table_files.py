"""Files of rows, read strictly into Arrow columns: nothing in them is guessed, mended or dropped.

A row is counted from 1, the header not included, a line from 1. Kinds of file, by their suffix
(that of a text file may be followed by .gz):

  .csv, .tsv       RFC 4180: a field with a separator, a quote or a line break is quoted whole, and
                   a quote in it is doubled
  .inter, .item    RecBole: tab separated, a quote is a character, column names are name:type
  .jsonl           an object per line
  .json            of two columns: an object {first: second} or {first: [second, ..]}
  .parquet, .pq
"""

import bisect
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl import logging

from tca4rec_jax.errors import UserError, one_line


class Delimited(NamedTuple):
    """A grammar of text: fields with separators between them, in rows.

    Attributes:
      separator: between two fields, one character or more.
      quoted: whether quotes may stand around a field, as RFC 4180 has it; else they are characters,
        and a column's name ends at a colon.
      names: of the columns, if the file begins with a row instead of a header.
    """

    separator: str
    quoted: bool = True
    names: tuple[str, ...] = ()


_DELIMITED = {
    ".csv": Delimited(","),
    ".tsv": Delimited("\t"),
    ".inter": Delimited("\t", quoted=False),
    ".item": Delimited("\t", quoted=False),
}
PARQUET = (".parquet", ".pq")
KINDS = (*_DELIMITED, ".jsonl", *PARQUET)
_BLOCK = 1 << 26  # bytes that Arrow parses at a time: no row may be longer
_HEADER = 1 << 20  # characters among which it ends
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 100
shown = _repr.repr  # of a value in a message, not too long

_LINE_BREAK = re.compile(rb"\r\n|\r|\n")


class MissingColumns(UserError):
    """Columns that a file does not have."""

    def __init__(self, message: str, missing: list[str]):
        super().__init__(message)
        self.missing = missing


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, of a .gz those that it holds."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file, perhaps .gz, without a byte order mark.

    Raises UserError, naming the line, for bytes that are not of the encoding, and for NUL.
    """
    try:
        with open_bytes(path) as file:
            data = file.read()
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {_line(data[: error.start])}: byte {data[error.start]:#04x} is not "
            f"{encoding}; save the file as UTF-8 (iconv -f cp1252 -t utf-8 OLD > NEW), or set "
            "data.encoding (cp1252, latin-1, utf-16 ...)"
        ) from error
    except LookupError as error:
        raise UserError(f"data.encoding: {error}; expected a name such as cp1252") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if (at := text.find("\0")) >= 0:
        line = _line(text[:at].encode("utf-8", "replace"))
        raise UserError(f"{path}, line {line}: a NUL character; expected text in {encoding}")
    return text


def read_json_objects(path: Path, encoding: str = "utf-8") -> list[dict]:
    """The objects of a JSON-lines file; empty lines are skipped. Raises UserError for the rest."""
    rows = []
    for number, line in enumerate(io.StringIO(read_text(path, encoding)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object such as {{...}}")
        rows.append(row)
    return rows


def read_key_values(path: Path, encoding: str = "utf-8") -> list[tuple[str, str, int]]:
    """(key, value, place among the key's values, from 1) of {key: value} or {key: [value, ..]}.

    Raises FileNotFoundError; UserError for a file that is no such JSON, naming the key of a value
    that is neither text nor a whole number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    text = read_text(path, encoding)
    try:
        found = json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected one JSON object such as {{...}}")
    rows = []
    for key, values in found.items():
        for place, value in enumerate(values if isinstance(values, list) else [values], start=1):
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise UserError(
                    f"{path}: value {place} of {shown(key)} is {shown(value)}, expected text or a "
                    "whole number"
                )
            rows.append((key, str(value), place))
    if not rows:
        raise UserError(f"{path} has no values")
    return rows


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises ValueError for a name that it has twice."""
    if len(found := dict(pairs)) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"a name occurs twice in an object: {shown(name)}")
    return found


def read_columns(
    path: Path, columns: Sequence[str] | None = None, encoding: str = "utf-8"
) -> pa.Table:
    """Some columns of a table file (default: all), in its order of rows; text files give text.

    Raises FileNotFoundError, or UserError for an unknown kind of file, a damaged or an empty one, a
    missing column, a column name that occurs twice, or a row with other fields than the header.
    """
    kind = kind_of(path)
    if path.is_file() and kind not in KINDS:
        raise UserError(f"{path} must end in one of {', '.join(KINDS)} (a text file also in .gz)")
    if kind in _DELIMITED:
        return read_delimited(path, _DELIMITED[kind], columns, encoding)
    check_file(path, columns)
    select = functools.partial(select_columns, path, columns)
    parquet = kind in PARQUET
    table = _read_parquet(path, select) if parquet else _read_jsonl(path, select, encoding)
    if not table.num_rows:
        raise UserError(f"{path} has a header but no rows")
    return table


def check_file(path: Path, columns: Sequence[str] | None = None) -> None:
    """Raises FileNotFoundError, or UserError for an empty file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (expected a file with {columns or 'rows'})")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: expected a header and rows")


def select_columns(path: Path, columns: Sequence[str] | None, names: list[str]) -> list[str]:
    """The columns to read of those that a file has."""
    columns = names if columns is None else columns
    if missing := [name for name in columns if name not in names]:
        raise MissingColumns(
            f"{path} has no column {missing}; its columns are {names}. Rename them, or say in the "
            "data config which ones to use",
            missing,
        )
    if twice := [name for name in columns if names.count(name) > 1]:
        raise UserError(
            f"{path} has more than one column {twice[0]!r}: rename or remove the others"
        )
    return list(dict.fromkeys(columns))


_Select = Callable[[list[str]], list[str]]


def _read_parquet(path: Path, select: _Select) -> pa.Table:
    with open_parquet(path) as file:
        names = select(file.schema_arrow.names)
        return file.read(columns=names).select(names)


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pa.parquet.ParquetFile]:
    """A Parquet file for the block. Raises UserError for one that is damaged."""
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except UserError:
        raise
    except (ValueError, OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a Parquet file: {one_line(error)}") from error


def parquet_parts(
    path: Path, columns: Sequence[str] | None = None, *, start: int = 0, rows: int = 1 << 16
) -> Iterator[pa.Table]:
    """Some columns of a Parquet file (default: all) from row `start`, counted from 0: at most so
    many rows at a time, so that little is in memory. Raises as `read_columns`."""
    with open_parquet(path) as file:
        names = select_columns(path, columns, file.schema_arrow.names)
        groups = range(file.num_row_groups)
        ends = [*itertools.accumulate(file.metadata.row_group(n).num_rows for n in groups)]
        first = bisect.bisect_right(ends, start)
        passed_over = start - ([0, *ends][first])
        for batch in file.iter_batches(rows, row_groups=groups[first:], columns=names):
            if passed_over < len(batch):
                yield pa.Table.from_batches([batch]).select(names).slice(passed_over)
            passed_over = max(0, passed_over - len(batch))


def _read_jsonl(path: Path, select: _Select, encoding: str) -> pa.Table:
    rows = read_json_objects(path, encoding)
    names = select(list(dict.fromkeys(name for row in rows for name in row)))
    return pa.table(
        {name: _json_column(path, name, [row.get(name) for row in rows]) for name in names}
    )


def _json_column(path: Path, name: str, values: list) -> pa.Array:
    if (array := _arrow(values)) is not None:
        return array
    row = bisect.bisect(range(len(values)), False, key=lambda n: _arrow(values[:n]) is None)
    raise UserError(
        f"{path}, row {row}: {name} is {shown(values[row - 1])}, expected text or a whole number "
        "below 2**63, as in the rows before"
    )


def _arrow(values: list) -> pa.Array | None:
    """None if they have no common type."""
    try:
        return pa.array(values)
    except (ValueError, OverflowError, pa.ArrowException):
        return None


def read_delimited(
    path: Path,
    grammar: Delimited,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
    dropped: list[int] | None = None,
) -> pa.Table:
    """Some columns of a delimited text, as text, whatever the name of the file; raises as
    `read_columns` does.

    Given a list `dropped`, rows with other fields than the first are left out, and their numbers
    added to it. This is Arrow's reader, which is lenient about quotes, after a check of the quotes.
    """
    check_file(path, columns)
    text = read_text(path, encoding)
    data, separator = _one_character(path, text.encode(), grammar.separator)
    if grammar.quoted:
        _check_quotes(path, data, separator)
    names = header = list(grammar.names) or _header(path, text, separator, grammar.quoted)
    del text
    if not grammar.quoted:
        names = [name.partition(":")[0] for name in header]
    chosen = {header[names.index(name)]: name for name in select_columns(path, columns, names)}
    wrong: list[pyarrow.csv.InvalidRow] = []

    def refuse(row: pyarrow.csv.InvalidRow) -> str:
        wrong.append(row)
        return "error" if dropped is None else "skip"

    parse = pyarrow.csv.ParseOptions(
        delimiter=separator,
        quote_char='"' if grammar.quoted else False,
        newlines_in_values=grammar.quoted,
        invalid_row_handler=refuse,
    )
    convert = pyarrow.csv.ConvertOptions(
        include_columns=list(chosen), column_types=dict.fromkeys(chosen, pa.large_string())
    )
    read = pyarrow.csv.ReadOptions(
        use_threads=False, block_size=_BLOCK, column_names=list(grammar.names) or None
    )
    try:
        table = pyarrow.csv.read_csv(pa.py_buffer(data), read, parse, convert)
    except (ValueError, pa.ArrowException) as error:
        if not wrong:
            raise UserError(f"{path} cannot be read as a table: {one_line(error)}") from error
        raise UserError(_other_fields(path, grammar, wrong[0])) from error
    if dropped is not None and wrong:
        message = _other_fields(path, grammar, wrong[0])
        logging.warning("Dropped %d rows: %s", len(wrong), message)
        dropped += [row.number if grammar.names else row.number - 1 for row in wrong]
    if not table.num_rows:
        raise UserError(f"{path} has a header but no rows")
    return table.rename_columns(list(chosen.values()))


def _one_character(path: Path, data: bytes, separator: str) -> tuple[bytes, str]:
    """Text whose separator is one character, which Arrow's reader needs, and that character."""
    if len(separator) == 1:
        return data, separator
    if (at := data.find(b"\x1f")) >= 0:
        raise UserError(f"{path}, line {_line(data[:at])}: a control character; expected text")
    return data.replace(separator.encode(), b"\x1f"), "\x1f"


def _other_fields(path: Path, grammar: Delimited, row: pyarrow.csv.InvalidRow) -> str:
    number = row.number if grammar.names else row.number - 1
    text = row.text.replace("\x1f", grammar.separator)
    message = f"{path}, row {number} has {row.actual_columns} fields, "
    if grammar.names:
        return message + f"expected {', '.join(grammar.names)}: {shown(text)}"
    return message + (
        f"the header {row.expected_columns}: {shown(text)}; a field with {grammar.separator!r} in "
        "it must be in double quotes"
    )


def _header(path: Path, text: str, separator: str, quoted: bool) -> list[str]:
    lines = csv.reader(
        io.StringIO(text[:_HEADER], newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    try:
        return next(filter(None, lines), [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}; expected a header") from error


def _check_quotes(path: Path, data: bytes, separator: str) -> None:
    """Raises UserError for a quote that is neither around a field nor doubled in a quoted one."""
    if b'"' not in data:
        return
    end = _quoting(separator).match(data).end()  # type: ignore[union-attr]  # it matches b""
    if end < len(data):
        field = data[end : end + 60].decode("utf-8", "replace")
        raise UserError(
            f"{path}, line {_line(data[:end])}: the quotes of the field that begins with {field!r} "
            "do not close, or stand inside it: write the whole field in double quotes and every "
            "quote in it twice"
        )


@functools.cache
def _quoting(separator: str) -> re.Pattern[bytes]:
    """Matches as many fields as are quoted by RFC 4180, or not at all and without a quote."""
    field = rb'(?:"(?:[^"]++|"")*+"|[^"\r\n%b]*+)' % separator.encode()
    return re.compile(rb"(?:%b(?:%b|\r\n|[\r\n]|\Z))*+" % (field, separator.encode()))


def _line(before: bytes) -> int:
    return len(_LINE_BREAK.findall(before)) + 1
