"""A file of histories: what `recommend_file` reads, row by row.

A line of JSONL is {"history": [items, oldest first]}, a row of a CSV has a column `history` with
the items separated by '|', a row of a Parquet file either of the two, or a list of whole numbers,
which are item ids. Only Parquet is read a part at a time: the other files are in memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tca4rec_jax.data.table_files import (
    PARQUET,
    kind_of,
    open_parquet,
    parquet_parts,
    read_columns,
    read_json_objects,
)
from tca4rec_jax.errors import UserError

HISTORY = "history"


class Histories:
    """The rows of a file, each with a history."""

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError, or UserError for another kind of file, or one without rows."""
        self.path = path = Path(path)
        self._kind = kind_of(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist (expected .jsonl, .csv or .parquet with histories)"
            )
        if self._kind not in (".jsonl", ".csv", *PARQUET):
            raise UserError(
                f"{path} must end in .jsonl or .csv (perhaps in .gz after it), or in .parquet"
            )
        self._rows: list[dict[str, Any]] = []
        if self._kind == ".jsonl":
            self._rows = read_json_objects(path)
        elif self._kind == ".csv":
            self._rows = read_columns(path).to_pylist()
        self._count = self._count_parquet() if self._kind in PARQUET else len(self._rows)
        if not self._count:
            raise UserError(f"{path} has no rows")

    def __len__(self) -> int:
        return self._count

    def rows(
        self, start: int = 0, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """The rows from row `start`, counted from 0; of Parquet some columns alone (default: all).

        HISTORY is a list of item ids or titles. Raises UserError naming file, row (counted from 1)
        and field for one that is not.
        """
        rows: Iterator[dict[str, Any]] = itertools.islice(self._rows, start, None)
        if self._kind in PARQUET:
            parts = parquet_parts(self.path, columns, start=start)
            rows = (row for part in parts for row in part.to_pylist())
        for number, row in enumerate(rows, start + 1):
            yield row | {HISTORY: self._history(number, row.get(HISTORY))}

    def tables(self) -> Iterator[pa.Table]:
        """All columns as they are, a part of the rows after the other.

        Raises UserError for JSON whose rows have no common type.
        """
        return (
            parquet_parts(self.path) if self._kind in PARQUET else iter([read_columns(self.path)])
        )

    def _count_parquet(self) -> int:
        with open_parquet(self.path) as file:
            if HISTORY not in (names := file.schema_arrow.names):
                raise UserError(f"{self.path} has no column {HISTORY!r}; its columns are {names}")
            return file.metadata.num_rows

    def _history(self, number: int, value: Any) -> list[str]:
        found = value
        if isinstance(value, str) and self._kind != ".jsonl":
            found = [item.strip() for item in value.split("|")]
        is_list = isinstance(found, list)
        if is_list and self._kind in PARQUET and {*map(type, found)} == {int}:
            found = list(map(str, found))
        if not (is_list and {*map(type, found)} == {str}):
            raise UserError(
                f"{self.path}, row {number}: {HISTORY} is {value!r}, expected item ids or titles, "
                "as a list of texts in JSONL, separated by '|' in CSV, as either in Parquet"
            )
        return found
