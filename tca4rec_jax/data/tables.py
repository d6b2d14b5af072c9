"""CSV, TSV, Parquet and RecBole files as data frames.

Ids and titles are text; timestamps are whole numbers. A value that is neither raises a UserError
that names the file, the row (counted from 1, the header not included) and the column.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pandas as pd

from tca4rec_jax.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t"}
_PARQUET = (".parquet", ".pq")


def read_table(path: str | os.PathLike, columns: dict[str, str]) -> pd.DataFrame:
    """The wanted columns of a file, renamed; text files give text, nothing is guessed.

    Args:
      path: .csv, .tsv, .parquet, .pq, or RecBole's .inter and .item (tab separated, no quotes,
        column names of the form name:type).
      columns: the name wanted here -> the name in the file.

    Raises:
      FileNotFoundError, UserError: unknown kind of file, empty file, missing column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (expected a file with {list(columns)})")
    frame = _read(path)
    missing = [name for name in columns.values() if name not in frame.columns]
    if missing:
        raise UserError(
            f"{path} has no column {missing}; its columns are {list(map(str, frame.columns))}. "
            f"Rename them, or say which ones to use for {list(columns)} in the data config"
        )
    if frame.empty:
        raise UserError(f"{path} has a header but no rows")
    return pd.DataFrame({wanted: frame[name] for wanted, name in columns.items()})


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
        frame = pd.read_csv(
            path,
            sep=_SEPARATORS[suffix],
            dtype=str,
            keep_default_na=False,
            quoting=csv.QUOTE_NONE if recbole else csv.QUOTE_MINIMAL,
            encoding="utf-8-sig",
            index_col=False,
        )
    except (ValueError, OSError) as error:  # pandas and pyarrow parser errors are ValueErrors
        raise UserError(f"{path} cannot be read as a {suffix} file: {error}") from error
    if recbole:
        frame.columns = [name.partition(":")[0] for name in frame.columns]
    return frame


def refuse(
    path: str | os.PathLike, name: str, values: pd.Series, bad: np.ndarray, expected: str
) -> None:
    """Raises UserError for the first bad row."""
    if bad.any():
        at = int(np.argmax(bad))
        value = values.iloc[at]
        value = value.item() if isinstance(value, np.generic) else value
        raise UserError(
            f"{path}, row {at + 1}: {name} is {value!r}, expected {expected} "
            f"({int(bad.sum())} such rows of {len(values)})"
        )


def refuse_unknown(
    path: str | os.PathLike, name: str, ids: np.ndarray, found: np.ndarray, among: str
) -> None:
    """Raises UserError for the first of `ids` whose index in `found` is negative."""
    unknown = list(dict.fromkeys(ids[found < 0]))
    if unknown:
        raise UserError(
            f"{path}, row {int(np.argmax(found < 0)) + 1}: {len(unknown)} {name}s are not in "
            f"{among}, such as {unknown[:5]}"
        )


def ids(path: str | os.PathLike, name: str, values: pd.Series) -> np.ndarray:
    """Ids as text (object [n]); whole numbers of a Parquet file become their digits."""
    refuse(path, name, values, values.isna().to_numpy(), "an id")
    if pd.api.types.is_float_dtype(values):
        fractional = (values != values.round()).to_numpy(bool)
        refuse(path, name, values, fractional, "text or a whole number")
        values = values.astype(np.int64)
    text = values.astype(str).str.strip()
    refuse(path, name, values, (text == "").to_numpy(bool), "an id")
    return text.to_numpy(object)


def titles(path: str | os.PathLike, name: str, values: pd.Series) -> np.ndarray:
    """Titles as text (object [n]), runs of white space made one space; none may be empty."""
    text = values.fillna("").astype(str).str.split().str.join(" ")
    expected = "a title (give it one or leave the item out)"
    refuse(path, name, values, (text == "").to_numpy(bool), expected)
    return text.to_numpy(object)


def integers(path: str | os.PathLike, name: str, values: pd.Series, least: int = 0) -> np.ndarray:
    """Whole numbers (int64 [n]); a date column of a Parquet file becomes microseconds."""
    if pd.api.types.is_datetime64_any_dtype(values):
        refuse(path, name, values, values.isna().to_numpy(), "a date")
        if values.dt.tz is not None:
            values = values.dt.tz_convert(None)
        return values.to_numpy("datetime64[us]").astype(np.int64)
    numbers = pd.to_numeric(values, errors="coerce")
    expected = f"a whole number of at least {least}"
    if not pd.api.types.is_integer_dtype(numbers) or numbers.isna().any():
        as_float = numbers.to_numpy(np.float64, na_value=np.nan)
        bad = ~np.isfinite(as_float)
        bad |= np.where(bad, 0.0, as_float) % 1 != 0
        bad |= ~(np.abs(as_float) < 2.0**62)
        refuse(path, name, values, bad, expected)
        numbers = pd.Series(as_float)
    array = numbers.to_numpy().astype(np.int64)
    refuse(path, name, values, array < least, expected)
    return array
