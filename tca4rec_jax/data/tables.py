"""The columns of a table as ids, titles, whole numbers and times.

Every error names the file, the row, counted from 1 (the header not included), and the column.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from tca4rec_jax.data.parquet_columns import ParquetColumns
from tca4rec_jax.data.table_files import PARQUET, kind_of, read_columns, read_key_values, shown
from tca4rec_jax.errors import UserError

CONTROL = r"[\x00-\x08\x0a-\x1f\x7f\x{85}\x{2028}\x{2029}]"  # all of them but the tab
_ROUNDED = r"^[+-]?\d(\.\d+[eE]\+?|[eE]\+)\d+$"  # 1.23457E+12
_NO_ID = {  # pattern -> what is expected
    "^$": "an id",
    CONTROL + r"|\t": "an id in one line, without control characters",
    _ROUNDED: "the whole id: a spreadsheet or a float has rounded this one",
}
_NO_TITLE = {
    "^$": "a title (give it one or leave the item out)",
    CONTROL: "a title in one line, without control characters",
}
_WHOLE = r"^[1-8]?\d{1,18}(\.0*)?$"  # int64 holds it
_DATE = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?$"
_EXACT = {16: 11, 32: 24, 64: 53}  # bits of a float -> those of its significand
_UNITS = {"seconds": 1e8, "milliseconds": 1e11, "microseconds": 1e14, "nanoseconds": 1e17}
_LATEST = 50  # times the least of a unit: the years 1973 to 2128
_Rows = TypeVar("_Rows")


class Reading(NamedTuple):
    """How a table is read: the encoding of a text file; whether rows that cannot be used are an
    error, or left out and logged."""

    encoding: str = "utf-8"
    drop_invalid: bool = False


STRICT = Reading()


def ticks_per_second(times: np.ndarray) -> int:
    """How many units of times since 1970 (int64 [n]) are a second, told by the latest of them.

    Raises UserError for times that may be of no unit.
    """
    latest = int(times.max())
    for power, least in enumerate(_UNITS.values()):
        if least <= latest < _LATEST * least:
            return 1000**power
    raise UserError(
        f"the latest time is {latest}: a window of time needs {', '.join(_UNITS)} since 1970"
    )


class BadRows(UserError):
    """Rows of a table that cannot be used: bool [n]."""

    def __init__(self, message: str, bad_n: np.ndarray):
        super().__init__(message)
        self.bad_n = bad_n


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of a file with n rows; `names` has their names in the file by those used here.

    Its methods raise BadRows for rows that cannot be used, and UserError for a column of a type
    that cannot.
    """

    path: Path
    names: Mapping[str, str]
    columns: Mapping[str, pa.Array]
    row_n: np.ndarray | range  # int [n], in the file, from 1

    def without(self, bad_n: np.ndarray) -> "Table":
        """The table without some of its rows."""
        kept = pa.array(~bad_n)
        columns = {name: values.filter(kept) for name, values in self.columns.items()}
        return replace(self, columns=columns, row_n=np.asarray(self.row_n)[~bad_n])

    def place(self, at: int) -> str:
        """What an error calls a row."""
        return f"row {self.row_n[at]}"

    def refuse(self, column: str, bad_n: np.ndarray | pa.Array, expected: str) -> None:
        """Raises BadRows, naming the first of them."""
        bad_n = np.asarray(bad_n, bool)
        if bad_n.any():
            at = int(np.argmax(bad_n))
            value = shown(self.columns[column][at].as_py())
            raise BadRows(
                f"{self.path}, {self.place(at)}: {self.names[column]} is {value}, expected "
                f"{expected} ({int(bad_n.sum())} such rows of {len(bad_n)})",
                bad_n,
            )

    def codes(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids by their number: int32 [n], and the distinct ids in the order in which they first
        occur (object), as text; whole numbers of a Parquet file become their digits."""
        values = self.columns[column]
        self.refuse(column, _missing(values), _NO_ID["^$"])
        try:
            encoded = _encoded(values)
        except pa.ArrowNotImplementedError:  # lists and the like
            encoded = pc.dictionary_encode(self._text(column, _NO_ID["^$"]))
        code_n, found = encoded.indices.to_numpy(), encoded.dictionary
        del values, encoded
        distinct = _Distinct(self.path, self.names, {column: found}, self.row_n, self, code_n)
        encoded = pc.dictionary_encode(
            pc.utf8_trim_whitespace(distinct._text(column, _NO_ID["^$"]))
        )
        if len(text := encoded.dictionary) < len(found):
            code_n = encoded.indices.to_numpy()[code_n]
            distinct = replace(distinct, columns={column: text}, code_n=code_n)
        for pattern, expected in _NO_ID.items():
            distinct.refuse(column, pc.match_substring_regex(text, pattern), expected)
        gap = pc.match_substring_regex(text, r"^-?\d+\.0+$")
        if pc.any(gap).as_py():
            whole = pc.replace_substring_regex(text, r"\.0+$", "")
            bad = pc.and_(gap, pc.is_in(whole, value_set=text))
            distinct.refuse(column, bad, "one form of an id, as the column has it without .0 too")
        return code_n, text.to_numpy(zero_copy_only=False)

    def ids(self, column: str) -> np.ndarray:
        """Ids as text (object [n]), as `codes` has them."""
        code_n, ids = self.codes(column)
        return ids[code_n]

    def indices(
        self, column: str, find: Callable[[np.ndarray], np.ndarray], among: str
    ) -> np.ndarray:
        """find(ids), int [n]; raises BadRows for ids that are not found, whose index is -1."""
        code_n, ids = self.codes(column)
        index = find(ids)
        found = index[code_n]
        unknown = ids[index < 0]
        if unknown.size:
            raise BadRows(
                f"{self.path}, {self.place(int(np.argmax(found < 0)))}: {len(unknown)} {column}s "
                f"are not in {among}, such as {unknown[:5].tolist()}",
                found < 0,
            )
        return found

    def titles(self, column: str) -> np.ndarray:
        """Titles as text (object [n]), runs of white space made one space; none may be empty."""
        text = self._line(column, _NO_TITLE)
        return np.array([" ".join(title.split()) for title in text.to_pylist()], object)

    def texts(self, column: str) -> pd.Series:
        """Text as it stands in the file ([n] of str)."""
        return self._text(column, "text").to_pandas()

    def attributes(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Columns of other texts by their name here, '' where a row has none; the texts of a list
        stand with commas between them."""
        return {name: tuple(self._attribute(name)) for name in names}

    def _attribute(self, column: str) -> np.ndarray:
        values = self.columns[column]
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            lists = (
                [one for one in texts or () if one is not None] for texts in values.to_pylist()
            )
            values = pa.array([", ".join(map(str, texts)) for texts in lists], pa.large_string())
        table = replace(self, columns={column: values})
        here_n = values.is_valid().to_numpy(zero_copy_only=False)
        texts_n = np.full(len(values), "", object)
        texts_n[here_n] = [
            " ".join(text.split()) for text in table.without(~here_n)._text(column, "").to_pylist()
        ]
        return texts_n

    def integers(self, column: str, least: int = 0, most: int = 2**62) -> np.ndarray:
        """Whole numbers, least..most: int64 [n]."""
        expected = f"a whole number of at least {least}"
        if most < 2**62:
            expected += f" and at most {most}"
        if pa.types.is_integer(self.columns[column].type):
            self.refuse(column, self.columns[column].is_null(), expected)
            numbers = self.columns[column].cast(pa.int64(), safe=False).to_numpy()
            self.refuse(column, (numbers < least) | (numbers > most), expected)
            return numbers
        text = pc.utf8_trim_whitespace(self._text(column, expected))
        self.refuse(column, pc.invert(pc.match_substring_regex(text, _WHOLE)), expected)
        text = pc.replace_substring_regex(text, r"\.0*$", "")
        numbers = text.cast(pa.int64()).to_numpy()
        self.refuse(column, (numbers < least) | (numbers > most), expected)
        return numbers

    def numbers(self, column: str) -> np.ndarray:
        """Finite numbers: float32 [n]."""
        values, types = self.columns[column], pa.types
        if any(one(values.type) for one in (types.is_floating, types.is_integer, types.is_decimal)):
            values = values.cast(pa.float64(), safe=False)
        else:
            values = pd.to_numeric(self.texts(column), errors="coerce")
        with np.errstate(over="ignore"):
            numbers = np.asarray(values, np.float64).astype(np.float32)
        self.refuse(column, ~np.isfinite(numbers), "a finite number that float32 holds")
        return numbers

    def times(self, column: str) -> np.ndarray:
        """Times since 1970 in one unit: int64 [n]. Dates, and text such as 2024-05-31T12:00:00Z,
        become microseconds."""
        values = self.columns[column]
        self.refuse(column, values.is_null(), "a time since 1970")
        if pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
            zone = getattr(values.type, "tz", None)
            values = values.cast(pa.timestamp("us", zone), safe=False)
            times = values.cast(pa.int64()).to_numpy()
        elif pa.types.is_integer(values.type):
            times = self.integers(column)
        else:
            text = self._text(column, "a time since 1970")
            dates = pc.sum(pc.match_substring_regex(text, _DATE)).as_py() or 0
            half = 2 * dates >= len(text) > 0
            times = self._dates(column, text) if half else self.integers(column)
        self.refuse(column, times < 0, "a time since 1970")
        self._check_unit(column, times)
        return times

    def _check_unit(self, column: str, times: np.ndarray) -> None:
        """Refuses times of another unit than most, if all of them are times of some unit."""
        counts, known_n = [], times == 0
        for least in _UNITS.values():
            of_unit = (times >= least) & (times < _LATEST * least)
            counts.append(np.count_nonzero(of_unit))
            known_n |= of_unit
        if known_n.all():
            most = int(np.argmax(counts))
            expected = f"{list(_UNITS)[most]} since 1970, as most rows have"
            least = list(_UNITS.values())[most]
            other_n = (times < least) | (times >= _LATEST * least)
            self.refuse(column, other_n & (times > 0), expected)

    def _dates(self, column: str, text: pa.Array) -> np.ndarray:
        """Microseconds, int64 [n], of ISO 8601 dates; without a zone they are UTC."""
        expected = "a date and time such as 2024-05-31T12:00:00Z, as other rows have"
        self.refuse(column, pc.invert(pc.match_substring_regex(text, _DATE)), expected)
        zoned_n = np.asarray(pc.match_substring_regex(text, r":.*(Z|[+-]\d\d:?\d\d)$"), bool)
        self.refuse(column, zoned_n != zoned_n[0], expected + ", all with a zone or none")
        dates = pd.to_datetime(text.to_pandas(), format="ISO8601", utc=True, errors="coerce")
        self.refuse(column, dates.isna().to_numpy(), expected)
        return dates.dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64)

    def _line(self, column: str, wrong: Mapping[str, str]) -> pa.Array:
        """Text without white space around it; `wrong` has what it must not match."""
        text = pc.utf8_trim_whitespace(self._text(column, wrong["^$"]))
        for pattern, expected in wrong.items():
            self.refuse(column, pc.match_substring_regex(text, pattern), expected)
        return text

    def _text(self, column: str, expected: str) -> pa.Array:
        """A column of text or whole numbers as text, without a missing value."""
        values = _decoded(self.columns[column])
        self.refuse(column, values.is_null(), expected)
        kind = values.type
        if pa.types.is_floating(kind):
            values = self._whole(column, values)
        elif pa.types.is_decimal(kind):
            values = pc.replace_substring_regex(values.cast(pa.string()), r"\.0+$", "")
            self.refuse(column, pc.match_substring(values, "."), "text or a whole number")
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            bad_n = np.array([not _is_utf8(value) for value in values.to_pylist()])
            self.refuse(column, bad_n, "text in UTF-8")
        elif not any(is_kind(kind) for is_kind in _TEXT):
            raise UserError(
                f"{self.path}: the column {self.names[column]} holds {kind}, expected text or "
                "whole numbers; store it as text"
            )
        return values.cast(pa.large_string())

    def _whole(self, column: str, values: pa.Array) -> pa.Array:
        """The whole numbers of a column of floats, none so large that the float has rounded it."""
        numbers = values.cast(pa.float64()).to_numpy()
        whole_n = np.isfinite(numbers) & (numbers == np.rint(numbers))
        self.refuse(column, ~whole_n, "text or a whole number")
        bits = _EXACT[values.type.bit_width]
        expected = f"a number below 2**{bits}, from where {values.type} rounds: store it as text"
        self.refuse(column, np.abs(numbers) >= 2.0**bits, expected)
        return pa.array(numbers.astype(np.int64))


_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Distinct(Table):
    """The distinct values of a column, whose errors are about the rows of the table."""

    table: Table
    code_n: np.ndarray  # int32 [n], the value of every row

    def refuse(self, column: str, bad_n: np.ndarray | pa.Array, expected: str) -> None:
        """Raises BadRows, naming the first of the rows with these values."""
        bad_n = np.asarray(bad_n, bool)
        if bad_n.any():
            self.table.refuse(column, bad_n[self.code_n], expected)


def _encoded(values: pa.Array) -> pa.DictionaryArray:
    """By the numbers of its distinct values, in the order in which they first occur."""
    if not pa.types.is_dictionary(values.type):
        return pc.dictionary_encode(values)
    used = pc.dictionary_encode(values.indices)  # what has been left out may have had others
    return pa.DictionaryArray.from_arrays(used.indices, values.dictionary.take(used.dictionary))


def _missing(values: pa.Array) -> pa.Array:
    """Bool [n]: nulls, those of a dictionary too."""
    if not pa.types.is_dictionary(values.type):
        return values.is_null()
    return values.dictionary.is_null().take(values.indices).fill_null(True)


def _decoded(values: pa.Array) -> pa.Array:
    """Without a dictionary."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


@dataclass(frozen=True, eq=False)
class KeyedTable(Table):
    """The values of a JSON object under their keys, the first column; `row_n` counts the values of
    one key from 1."""

    def place(self, at: int) -> str:
        """What an error calls a row."""
        key, values = next(iter(self.columns.items()))
        return f"value {self.row_n[at]} of the {key} {shown(values[at].as_py())}"


def read_table(path: Path, names: Mapping[str, str], encoding: str = "utf-8") -> Table:
    """Some columns (name here -> name in the file) of a file; raises as `read_columns` does.

    A .json has two, the keys and their values; raises UserError if `names` has others.
    """
    if kind_of(path) == ".json":
        if len(names) != 2:
            wanted = ", ".join(names)
            raise UserError(f"{path}: a JSON object has keys and values, not {wanted}; use a table")
        keys, values, row_n = zip(*read_key_values(path, encoding), strict=True)
        arrays = (pa.array(column, pa.large_string()) for column in (keys, values))
        return KeyedTable(path, names, dict(zip(names, arrays, strict=True)), np.array(row_n))
    if kind_of(path) in PARQUET:
        large = ParquetColumns(path, names)
        return Table(path, names, large, range(1, large.num_rows + 1))
    found = read_columns(path, list(names.values()), encoding)
    columns = {here: found[name].combine_chunks() for here, name in names.items()}
    return Table(path, names, columns, range(1, found.num_rows + 1))


def read_rows(
    path: Path, names: Mapping[str, str], read: Callable[[Table], _Rows], reading: Reading
) -> _Rows:
    """read(the table); raises as `read_table` and the methods of Table do."""
    return usable_rows(read_table(path, names, reading.encoding), read, reading.drop_invalid)


def usable_rows(table: Table, read: Callable[[Table], _Rows], drop_invalid: bool) -> _Rows:
    """read(the table), perhaps without its rows that cannot be used, which is logged."""
    while True:
        try:
            return read(table)
        except BadRows as error:
            if not drop_invalid or error.bad_n.all():
                raise
            logging.warning("Dropped %d rows: %s", error.bad_n.sum(), error)
            table = table.without(error.bad_n)
