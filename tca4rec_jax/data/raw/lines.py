"""Files of one object per line, JSON or Python's way to write a dict, read into Arrow columns.

A block of whole lines is parsed at a time by Arrow, which keeps the wanted values alone; a block
that Arrow refuses is read again line by line, which says what is wrong and where.
"""

import ast
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from absl import logging

from tca4rec_jax.data.table_files import check_file, open_bytes, shown, unique_names
from tca4rec_jax.errors import UserError, one_line
from tca4rec_jax.terminal import Progress

_BLOCK = 1 << 25  # bytes that are parsed at a time, and the rest of their last line


def read_lines(
    path: Path,
    types: Mapping[str, pa.DataType],
    python: bool = False,
    drop_invalid: bool = False,
) -> tuple[pa.Table, np.ndarray]:
    """Some values of every object, by name null where it has none; and the lines, int64 [n].

    The file may be .gz; empty lines are skipped. With `python` a line is a dict as Python writes it
    ("{'asin': u'0001'}"). Raises FileNotFoundError; UserError, naming the line, for what is no
    object, a value of another type and text that is no UTF-8; with `drop_invalid` such lines are
    left out, which is logged.
    """
    check_file(path, list(types))
    schema = pa.schema(list(types.items()))
    tables, lines, first = [], [], 1
    dropped: list[str] | None = [] if drop_invalid else None
    for block in _blocks(path):
        table, line_n = (None if python else _fast(block, schema)), None
        if table is None:
            table, line_n = _line_by_line(path, block, schema, first, python, dropped)
        count = block.count(b"\n")
        tables.append(table)
        lines.append(np.arange(first, first + table.num_rows) if line_n is None else line_n)
        first += count
    if dropped:
        logging.warning("Dropped %d lines: %s", len(dropped), dropped[0])
    table = pa.concat_tables([schema.empty_table(), *tables])
    if not table.num_rows:
        raise UserError(f"{path} has no rows")
    return table, np.concatenate(lines)


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks of whole lines, each with its line break."""
    rest = b""
    try:
        with (
            open_bytes(path) as file,
            Progress(f"Reading {path.name}", unit="bytes") as progress,
        ):
            while block := file.read(_BLOCK):
                progress.advance(len(block))
                whole, end, begun = block.rpartition(b"\n")
                if end:
                    yield rest + whole + end
                    rest = begun
                else:
                    rest += begun
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; fetch it again") from error
    if rest:
        yield rest + b"\n"


def _fast(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """The block as Arrow reads it; None if it does not, or not one object per line."""
    read = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block))
    parse = pyarrow.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="ignore", newlines_in_values=False
    )
    try:
        block.decode()  # Arrow looks at the wanted values alone
        table = pyarrow.json.read_json(pa.BufferReader(block), read, parse)
    except (ValueError, pa.ArrowException):
        return None
    objects = block.count(b"\n{") + block.startswith(b"{")
    whole = table.num_rows == block.count(b"\n") == objects  # one in every line
    return table.select(schema.names) if whole else None


def _line_by_line(
    path: Path,
    block: bytes,
    schema: pa.Schema,
    first: int,
    python: bool,
    dropped: list[str] | None,
) -> tuple[pa.Table, np.ndarray]:
    """The objects, and their lines; with a list for what is dropped, what is wrong goes there."""
    rows, lines = [], []
    for number, line in enumerate(block.split(b"\n"), start=first):
        if not line.strip():
            continue
        try:
            row = _parsed(path, number, line, python)
            values = [row.get(name) for name in schema.names]
            if dropped is not None:
                _check_values(path, number, schema, values)
        except UserError as error:
            if dropped is None:
                raise
            dropped.append(str(error))
            continue
        rows.append(values)
        lines.append(number)
    columns = zip(*rows, strict=True) if rows else ([] for _ in schema.names)
    arrays = [_arrow(values, field.type) for field, values in zip(schema, columns, strict=True)]
    if any(array is None for array in arrays):
        for number, values in zip(lines, rows, strict=True):
            _check_values(path, number, schema, values)
    return pa.table(arrays, schema), np.array(lines, np.int64)


def _check_values(path: Path, number: int, schema: pa.Schema, values: list) -> None:
    """Raises UserError for a value of another type than its column."""
    for field, value in zip(schema, values, strict=True):
        if _arrow([value], field.type) is None:
            kind = _WORDS.get(field.type, f"a {field.type}")
            raise UserError(
                f"{path}, line {number}: {field.name} is {shown(value)}, expected {kind}"
            )


def _parsed(path: Path, number: int, line: bytes, python: bool) -> dict[str, Any]:
    kind = "Python dict" if python else "JSON object"
    try:
        text = line.decode("utf-8-sig")
        if python:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes in texts
                row = ast.literal_eval(text.strip())
        else:
            row = json.loads(text, object_pairs_hook=unique_names)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{path}, line {number} is no {kind}: {one_line(error, 200)}; it begins with "
            f"{shown(line[:60])}"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected a {kind} such as {{...}}")
    return row


_WORDS = {
    pa.large_string(): "text",
    pa.float64(): "a number",
    pa.int64(): "a whole number below 2**63",
    pa.list_(pa.string()): "a list of texts",
    pa.list_(pa.list_(pa.string())): "a list of lists of texts",
}


def _arrow(values: Any, kind: pa.DataType) -> pa.Array | None:
    """None for values of other types."""
    if pa.types.is_integer(kind) and any(isinstance(value, bool | float) for value in values):
        return None
    try:
        return pa.array(values, kind)
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return None
