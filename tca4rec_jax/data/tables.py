"""CSV, TSV, Parquet and RecBole files as columns of text and whole numbers.

Every error names the file, the column and the row, counted from 1, the header not included.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tca4rec_jax.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of a file with n rows; `names` has their names in the file by those used here."""

    path: Path
    names: Mapping[str, str]
    frame: pd.DataFrame

    def __getitem__(self, column: str) -> pd.Series:
        return self.frame[column]

    def refuse(self, column: str, bad_n: np.ndarray, expected: str) -> None:
        """Raises UserError for the first bad row."""
        if bad_n.any():
            at = int(np.argmax(bad_n))
            value = self[column].iloc[at]
            value = value.item() if isinstance(value, np.generic) else value
            raise UserError(
                f"{self.path}, row {at + 1}: {self.names[column]} is {value!r}, expected "
                f"{expected} ({int(bad_n.sum())} such rows of {len(bad_n)})"
            )

    def ids(self, column: str) -> np.ndarray:
        """Ids as text (object [n]); whole numbers of a Parquet file become their digits."""
        values = self[column]
        self.refuse(column, values.isna().to_numpy(), "an id")
        if pd.api.types.is_float_dtype(values):
            fractional = (values != values.round()).to_numpy(bool)
            self.refuse(column, fractional, "text or a whole number")
            values = values.astype(np.int64)
        text = values.astype(str).str.strip()
        self.refuse(column, (text == "").to_numpy(bool), "an id")
        return text.to_numpy(object)

    def indices(
        self, column: str, find: Callable[[np.ndarray], np.ndarray], among: str
    ) -> np.ndarray:
        """find(ids), int [n]; raises UserError for ids that are not found, whose index is -1."""
        ids = self.ids(column)
        found = find(ids)
        unknown = list(dict.fromkeys(ids[found < 0]))
        if unknown:
            raise UserError(
                f"{self.path}, row {int(np.argmax(found < 0)) + 1}: {len(unknown)} {column}s are "
                f"not in {among}, such as {unknown[:5]}"
            )
        return found

    def titles(self, column: str) -> np.ndarray:
        """Titles as text (object [n]), runs of white space made one space; none may be empty."""
        text = self[column].fillna("").astype(str).str.split().str.join(" ")
        expected = "a title (give it one or leave the item out)"
        self.refuse(column, (text == "").to_numpy(bool), expected)
        return text.to_numpy(object)

    def integers(self, column: str, least: int = 0) -> np.ndarray:
        """Whole numbers (int64 [n]); a date column of a Parquet file becomes microseconds."""
        values = self[column]
        if pd.api.types.is_datetime64_any_dtype(values):
            self.refuse(column, values.isna().to_numpy(), "a date")
            if values.dt.tz is not None:
                values = values.dt.tz_convert(None)
            return values.to_numpy("datetime64[us]").astype(np.int64)
        numbers = pd.to_numeric(values, errors="coerce")
        expected = f"a whole number of at least {least}"
        if not pd.api.types.is_integer_dtype(numbers) or numbers.isna().any():
            as_float = numbers.to_numpy(np.float64, na_value=np.nan)
            whole = np.isfinite(as_float) & (np.abs(as_float) < 2.0**62)
            self.refuse(column, ~whole | (np.where(whole, as_float, 0.0) % 1 != 0), expected)
            numbers = pd.Series(as_float)
        array = numbers.to_numpy().astype(np.int64)
        self.refuse(column, array < least, expected)
        return array


def read_table(path: Path, names: Mapping[str, str]) -> Table:
    """Some columns (name here -> name in the file); text files give text, nothing is guessed.

    A file is a .csv, .tsv, .parquet, .pq, or RecBole's .inter or .item (tab separated, no quotes,
    column names of the form name:type). Raises FileNotFoundError, or UserError for an unknown kind
    of file, an empty file or a missing column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (expected a file with {list(names)})")
    frame = _read(path)
    missing = [name for name in names.values() if name not in frame.columns]
    if missing:
        raise UserError(
            f"{path} has no column {missing}; its columns are {list(map(str, frame.columns))}. "
            f"Rename them, or say which ones to use for {list(names)} in the data config"
        )
    if frame.empty:
        raise UserError(f"{path} has a header but no rows")
    return Table(path, names, pd.DataFrame({here: frame[name] for here, name in names.items()}))


def _read(path: Path) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix not in (*_SEPARATORS, *_PARQUET):
        raise UserError(f"{path} must end in one of {[*_SEPARATORS, *_PARQUET]}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: expected a header and rows")
    try:
        if suffix in _PARQUET:
            return pd.read_parquet(path)
        recbole = suffix in (".inter", ".item")
        quoting = csv.QUOTE_NONE if recbole else csv.QUOTE_MINIMAL
        options = {"dtype": str, "keep_default_na": False, "index_col": False, "quoting": quoting}
        frame = pd.read_csv(path, sep=_SEPARATORS[suffix], encoding="utf-8-sig", **options)
    except (ValueError, OSError) as error:  # pandas and pyarrow parser errors are ValueErrors
        raise UserError(f"{path} cannot be read as a {suffix} file: {error}") from error
    return frame.rename(columns=lambda name: name.partition(":")[0]) if recbole else frame
