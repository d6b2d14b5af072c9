"""Columns of a Parquet file that are not in memory together, of text the distinct values alone."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tca4rec_jax.data.table_files import open_parquet, parquet_parts, read_columns, select_columns

_ROWS = 1 << 20
_DISTINCT = 1 << 24  # values of parts, before they are joined


class ParquetColumns(Mapping[str, pa.Array]):
    """Columns of a Parquet file, each read when it is asked for; the last one is kept.

    One of text is a dictionary of large_string. Raises as `read_columns` does.
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
        if self.num_rows and pa.types.is_integer(kind):
            return self._numbers(name, kind)
        if self.num_rows and _is_text(kind):
            parts = parquet_parts(self._path, [name], rows=_ROWS)
            return _joined(_encoded(part[name]) for part in parts)
        return self._whole(name)

    def _numbers(self, name: str, kind: pa.DataType) -> pa.Array:
        values_n, end = np.empty(self.num_rows, kind.to_pandas_dtype()), 0
        for part in parquet_parts(self._path, [name], rows=_ROWS):
            if part[name].null_count:
                return self._whole(name)
            values_n[end : end + len(part)] = part[name]
            end += len(part)
        return pa.array(values_n)  # which it shares

    def _whole(self, name: str) -> pa.Array:
        column = read_columns(self._path, [name])[name]
        if pa.types.is_binary(column.type):  # one array of them holds 2 GiB
            column = column.cast(pa.large_binary())
        return column.combine_chunks()

    def __getitem__(self, here: str) -> pa.Array:
        return self._read(self._names[here])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view
    return any(test(kind) for test in tests)


def _encoded(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """Text by the numbers of its distinct values."""
    return pc.dictionary_encode(values.cast(pa.large_string()).combine_chunks())


def _joined(parts: Iterable[pa.DictionaryArray]) -> pa.DictionaryArray:
    """The parts one after the other, with one dictionary: values as they first occur."""
    waiting: list[pa.DictionaryArray] = []
    distinct = 0
    for part in parts:
        waiting.append(part)
        distinct += len(part.dictionary)
        if distinct > _DISTINCT:
            waiting, distinct = [_one(waiting)], 0
    return _one(waiting)


def _one(parts: list[pa.DictionaryArray]) -> pa.DictionaryArray:
    return pa.chunked_array(parts).unify_dictionaries().combine_chunks()
