"""Rows as the records of ArrayRecord files: tf.Example, encoded for many rows at a time."""

import errno
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.windows import RowSource, parts_of
from tca4rec_jax.errors import one_line

# One by one, as TFDS writes and Grain reads them; so short a record is compressed to more bytes.
_OPTIONS = "group_size:1,uncompressed"


def write_shard(rows: RowSource, path: Path) -> int:
    """Writes an ArrayRecord file; the bytes of its records, as TFDS counts them.

    Raises OSError, with the path, if it cannot be written.
    """
    return write_parts(parts_of(rows), path)


def write_parts(parts: Iterable[ItemSequences], path: Path) -> int:
    """As `write_shard`, of rows that come some at a time."""
    size = 0
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
        for part in parts:
            for record in records(part):
                writer.write(record)
                size += len(record)
        writer.close()
    except RuntimeError as error:  # what the writer says of a full disk
        raise OSError(errno.EIO, one_line(error), str(path)) from error
    return size


def records(rows: ItemSequences) -> Iterator[bytes]:
    """Every row as the bytes of a tf.Example whose features are in the order of their names.

    Those that `Example.SerializeToString(deterministic=True)` gives.
    """
    columns = {"items": rows.items, "timestamps": rows.timestamps, "user": rows.user}
    if rows.liked is not None:
        columns["liked"] = rows.liked
    features = []
    for name, values in sorted(columns.items()):
        data, ends = _varints(values.astype(np.int64))
        bounds = ends if name == "user" else ends[rows.offsets]
        features.append([*_entries(name, data, bounds.tolist())])
    for entries in zip(*features, strict=True):
        example = b"".join(entries)
        yield _before(_FIRST, len(example)) + example


def _entries(name: str, data: bytes, bounds: list[int]) -> Iterator[bytes]:
    """A feature of every row: Features.feature's entry of its name and packed Int64List."""
    begun = bounds[0]
    for end in bounds[1:]:
        yield _head(name, end - begun) + data[begun:end]
        begun = end


_FIRST, _SECOND, _THIRD = b"\x0a", b"\x12", b"\x1a"  # numbers of fields that hold bytes


@cache
def _before(field: bytes, length: int) -> bytes:
    """What stands before a field of so many bytes."""
    return field + _varints(np.array([length]))[0]


@cache
def _head(name: str, length: int) -> bytes:
    """What stands before the values of a feature, which take so many bytes."""
    head = _before(_FIRST, length)  # Int64List.value
    head = _before(_THIRD, len(head) + length) + head  # Feature.int64_list
    head = _before(_SECOND, len(head) + length) + head  # the entry's value
    head = _before(_FIRST, len(name)) + name.encode() + head  # and its key
    return _before(_FIRST, len(head) + length) + head


def _varints(values_n: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Whole numbers (int64 [n]) as protobuf's varints; the bounds of each, int64 [n + 1]."""
    bits_n = values_n.view(np.uint64)
    size_n = np.ones(len(bits_n), np.int64)
    for shift in range(7, 64, 7):
        size_n += bits_n >= np.uint64(1 << shift)
    bounds = np.concatenate([[0], np.cumsum(size_n)])
    data = np.empty(bounds[-1], np.uint8)
    for number in range(int(size_n.max(initial=0))):
        here_n = size_n > number
        low = (bits_n[here_n] >> np.uint64(7 * number)).astype(np.uint8) & np.uint8(127)
        more = (size_n[here_n] > number + 1).astype(np.uint8) << np.uint8(7)
        data[bounds[:-1][here_n] + number] = low | more
    return data.tobytes(), bounds
