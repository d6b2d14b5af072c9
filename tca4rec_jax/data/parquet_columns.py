"""Columns of a Parquet file that are not in memory together."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from tca4rec_jax.data.table_files import open_parquet, read_columns, select_columns


class ParquetColumns(Mapping[str, pa.Array]):
    """Columns of a Parquet file, each read when it is asked for; the last one is kept."""

    def __init__(self, path: Path, names: Mapping[str, str]):
        with open_parquet(path) as file:
            select_columns(path, list(names.values()), file.schema_arrow.names)
            self.num_rows = file.metadata.num_rows
        self._names = names
        self._read = lru_cache(1)(lambda name: read_columns(path, [name])[name].combine_chunks())

    def __getitem__(self, here: str) -> pa.Array:
        return self._read(self._names[here])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
