"""A column of the common form, and how it is made of the columns of a downloaded file."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tca4rec_jax.data.movielens import readable_title
from tca4rec_jax.data.raw.lines import read_lines
from tca4rec_jax.data.table_files import Delimited, read_delimited
from tca4rec_jax.data.tables import Reading, Table

TEXT, NUMBER, WHOLE = pa.large_string(), pa.float64(), pa.int64()
TEXTS = pa.list_(pa.string())
PATHS = pa.list_(TEXTS)  # a category below another below another; several of them

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_TITLE_YEAR = re.compile(r"^(.*?)\s*\((\d{4})\)$", re.DOTALL)


class Lines(NamedTuple):
    """A grammar: an object per line, in JSON or as Python writes a dict."""

    python: bool = False


class Column(NamedTuple):
    """Of which columns of a file, of what type, a column is made, and how."""

    names: tuple[str, ...]
    type: pa.DataType = TEXT
    make: Callable[..., pa.Array] = lambda values: values


class _LineTable(Table):
    """A table whose rows are lines."""

    def place(self, at: int) -> str:
        """What an error calls a row."""
        return f"line {self.row_n[at]}"


@dataclass(frozen=True)
class Layout:
    """How one kind of downloaded file lies: its grammar, and the columns of the common form.

    Those are 'user', 'item', 'timestamp' and perhaps 'rating'; or 'item', 'title' and attributes.
    """

    grammar: Delimited | Lines
    columns: Mapping[str, Column]

    def read(self, path: Path, wanted: Iterable[str], reading: Reading) -> Table:
        """The wanted columns of a file; raises as `read_delimited` and `read_lines` do."""
        made = {here: self.columns[here] for here in wanted}
        types = {name: column.type for column in made.values() for name in column.names}
        kind: type[Table] = Table
        if isinstance(self.grammar, Lines):
            kind = _LineTable
            table, row_n = read_lines(path, types, self.grammar.python, reading.drop_invalid)
        else:
            dropped: list[int] | None = [] if reading.drop_invalid else None
            table = read_delimited(path, self.grammar, list(types), reading.encoding, dropped)
            rows = np.arange(1, table.num_rows + len(dropped or ()) + 1)
            row_n = np.setdiff1d(rows, dropped or ())
        columns = {
            here: column.make(*(table[name].combine_chunks() for name in column.names))
            for here, column in made.items()
        }
        names = {here: " or ".join(column.names[:2]) for here, column in made.items()}
        return kind(path, names, columns, row_n)


def of(*names: str, kind: pa.DataType = TEXT, make: Callable[..., pa.Array] | None = None):
    """A column of one or more columns of a file."""
    return Column(names, kind) if make is None else Column(names, kind, make)


def first_path(paths: pa.Array) -> pa.Array:
    """The first of the paths of every item, such as ['Toys', 'Games'] (TEXTS)."""
    return pa.array([paths_of and paths_of[0] for paths_of in paths.to_pylist()], TEXTS)


def first_text(texts: pa.Array, others: pa.Array) -> pa.Array:
    """The texts, and the others where they are missing or ''."""
    return pc.if_else(pc.fill_null(pc.equal(texts, ""), True), others, texts)


def spaced(separator: str) -> Callable[[pa.Array], pa.Array]:
    """Texts with commas where `separator` stood: 'Drama|War' -> 'Drama, War'."""
    return lambda values: pc.replace_substring(values, separator, ", ")


def named_flags(names: Sequence[str]) -> Callable[..., pa.Array]:
    """The names of the columns that have a '1', with commas between."""

    def make(*flags: pa.Array) -> pa.Array:
        rows = zip(*(flag.to_pylist() for flag in flags), strict=True)
        return pa.array(
            [
                ", ".join(name for name, flag in zip(names, row, strict=True) if flag == "1")
                for row in rows
            ],
            TEXT,
        )

    return make


def movie_title(stored: pa.Array) -> pa.Array:
    """'Usual Suspects, The (1995)' -> 'The Usual Suspects (1995)'."""
    return _of_movies(stored, readable_title)


def movie_year(stored: pa.Array) -> pa.Array:
    """'Usual Suspects, The (1995)' -> '1995'; '' where a title has none."""
    return _of_movies(stored, lambda name, year: year)


def _of_movies(stored: pa.Array, make: Callable[[str, str], str]) -> pa.Array:
    titles = [(title or "").strip() for title in stored.to_pylist()]
    found = ((title, _TITLE_YEAR.match(title)) for title in titles)
    return pa.array([make(*(one.groups() if one else (title, ""))) for title, one in found], TEXT)


def year(dates: pa.Array) -> pa.Array:
    """The year that a date such as 2018-01-04 begins with; null without one."""
    found = pc.extract_regex(dates, r"^(?P<year>\d{4})")
    return pc.struct_field(found, "year")


def iso_date(dates: pa.Array) -> pa.Array:
    """'Fri Aug 25 13:55:02 -0700 2017' -> '2017-08-25T13:55:02-0700'; others stay as they are."""
    pattern = r"^\w{3} (\w{3}) (\d\d) (\d\d:\d\d:\d\d) ([+-]\d{4}) (\d{4})$"
    dates = pc.replace_substring_regex(dates, pattern, r"\5-\1-\2T\3\4")
    for number, month in enumerate(_MONTHS, start=1):
        dates = pc.replace_substring(dates, f"-{month}-", f"-{number:02}-")
    return dates
