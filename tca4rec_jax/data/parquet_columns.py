"""Columns of a Parquet file that are not in memory together."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from tca4rec_jax.data.table_files import open_parquet, parquet_parts, read_columns, select_columns

_ROWS = 1 << 20


class ParquetColumns(Mapping[str, pa.Array]):
    """Columns of a Parquet file, each read when it is asked for; the last one is kept.

    Raises as `read_columns` does.
    """

    def __init__(self, path: Path, names: Mapping[str, str]):
        with open_parquet(path) as file:
            self._schema = file.schema_arrow
            self.num_rows = file.metadata.num_rows
        select_columns(path, list(names.values()), self._schema.names)
        self._path, self._names = path, names
        self._read = lru_cache(1)(self._column)

    def _column(self, name: str) -> pa.Array:
        kind = self._schema.field(name).type
        if not (pa.types.is_integer(kind) and self.num_rows):
            return read_columns(self._path, [name])[name].combine_chunks()
        values_n, end = np.empty(self.num_rows, kind.to_pandas_dtype()), 0
        for part in parquet_parts(self._path, [name], rows=_ROWS):
            if part[name].null_count:
                return read_columns(self._path, [name])[name].combine_chunks()
            values_n[end : end + len(part)] = part[name]
            end += len(part)
        return pa.array(values_n)  # which it shares

    def __getitem__(self, here: str) -> pa.Array:
        return self._read(self._names[here])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
