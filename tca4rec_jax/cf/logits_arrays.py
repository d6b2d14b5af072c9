"""The zarr arrays of a CF logits store: written, opened and checked shard by shard.

A place is a local path, or the URL of a bucket such as gs://bucket/logits (whatever tensorstore
knows). A shard is a chunk of the zarr array, a file of its own of about a megabyte.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.data.sequences import ItemSequences

REMEDY = "run launch/train_cf.py for this data, or import your own logits for it again"
DTYPES = ("float32", "bfloat16", "float16")
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2", "int32": "<i4"}
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20  # what is copied or checked at once
_CACHE_BYTES = 256 << 20

Place = Path | str


class LogitsStoreError(ValueError):
    """CF logits that are missing or damaged, or that do not fit the data they are used with."""


def place_of(path: Place) -> Place:
    """A URL as it is, anything else as a Path."""
    return str(path).rstrip("/") if "://" in str(path) else Path(path)


def within(place: Place, name: str) -> Place:
    """`name` below the place."""
    return place / name if isinstance(place, Path) else f"{place}/{name}"


def key_values(place: Place) -> ts.KvStore:
    """The files below a place, by their names."""
    if isinstance(place, Path):
        return ts.KvStore.open({"driver": "file", "path": f"{place.absolute()}/"}).result()
    return ts.KvStore.open(f"{place}/").result()


def _spec(place: Place) -> dict:
    return {"driver": "zarr", "kvstore": key_values(place).spec().to_json()}


def open_array(place: Place, shape: list[int], dtype: str = "float32") -> ts.TensorStore:
    """Opens an array for reading; LogitsStoreError if it is not of this shape and dtype."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        array = ts.open(_spec(place), open=True, read=True, context=context).result()
    except (ValueError, OSError) as error:
        raise LogitsStoreError(f"{place} cannot be opened ({error}); {REMEDY}") from error
    if list(array.shape) != shape or array.dtype.name != dtype:
        raise LogitsStoreError(
            f"{place}: {array.dtype.name} of shape {list(array.shape)}, expected {dtype} of "
            f"shape {shape}; {REMEDY}"
        )
    return array


def create_array(place: Place, shape: list[int], dtype: str) -> ts.TensorStore:
    """A new array. What is never written reads as NaN (or -1), so that a lost shard is noticed."""
    row_bytes = ts.dtype(dtype).numpy_dtype.itemsize * int(np.prod(shape[1:]))
    metadata = {
        "dtype": _ZARR_DTYPES[dtype],
        "shape": shape,
        "chunks": [max(1, min(shape[0], _CHUNK_BYTES // max(row_bytes, 1))), *shape[1:]],
        "fill_value": -1 if dtype == "int32" else "NaN",
    }
    return ts.open(_spec(place) | {"metadata": metadata}, create=True).result()


def block_rows(shape) -> int:
    """How many rows of an array are copied or checked at once."""
    return max(1, _BLOCK_BYTES // (4 * max(int(np.prod(shape[1:])), 1)))


def blocks(array, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) of anything that is sliced, a bounded number of bytes at a time."""
    rows = rows or block_rows(array.shape)
    for start in range(0, array.shape[0], rows):
        block = array[start : min(start + rows, array.shape[0])]  # tensorstore does not clamp
        block = block.read().result() if isinstance(block, ts.TensorStore) else block
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinite
            yield start, np.asarray(block, np.float32)


class Rows:
    """How entries map to rows of the data, for messages."""

    def __init__(self, sequences: ItemSequences, entries_per: str):
        self._sequences, self._entries_per = sequences, entries_per

    def name(self, index: int) -> str:
        """'(row 3 of the data, place 2)'."""
        if self._entries_per == "row":
            return f"(row {index} of the data)"
        offsets = self._sequences.offsets
        row = int(np.searchsorted(offsets, index, side="right")) - 1
        return f"(row {row} of the data, place {index - offsets[row]})"


def check_finite(place: Place, start: int, block: np.ndarray, rows: Rows | None) -> None:
    """Raises LogitsStoreError if a block (from entry `start` on) holds NaN or infinity.

    Args:
      place: the array or the user's file, for the message.
      rows: how its entries map to the data; None for arrays over items.
    """
    bad = ~np.isfinite(block)
    if not bad.any():
        return
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    index = start + int(first[0])
    of_row = f" {rows.name(index)}" if rows else ""
    column = f", column {first[1]}" if block.ndim == 2 else ""
    raise LogitsStoreError(
        f"{place}: entry {index}{column}{of_row} is {block[first]}; CF logits must be finite. Find "
        "out why the CF model gave this value (a diverged training, a division by zero, a number "
        "beyond the dtype) and write the logits again; an item that must not be chosen gets a "
        "large negative number, not -inf"
    )


def check_array(
    place: Place, array: ts.TensorStore, rows: Rows | None, entries: np.ndarray | None = None
) -> None:
    """Reads an array, or only the shards of some entries, and checks that all is there and finite.

    Args:
      place: where the array lies.
      array: an open array.
      rows: how its entries map to the data; None for arrays over items.
      entries: int [m], those that matter here; None for all.

    Raises:
      LogitsStoreError: a shard is missing or damaged, a value NaN or infinite; the message names
        the file and the entries or the row.
    """
    shard = array.chunk_layout.read_chunk.shape[0]
    wanted = (
        np.arange(-(-array.shape[0] // shard)) if entries is None else np.unique(entries // shard)
    )
    _check_shards_exist(place, array, wanted, shard, rows)
    per_block = max(1, block_rows(array.shape) // shard)
    for chosen in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
        for first in range(0, len(chosen), per_block):
            some = chosen[first : first + per_block]
            start, stop = some[0] * shard, min((some[-1] + 1) * shard, array.shape[0])
            block = _read_shards(place, array, start, stop, shard, rows)
            check_finite(place, int(start), block, rows)


def _read_shards(place, array, start, stop, shard, rows) -> np.ndarray:
    try:
        return np.asarray(array[start:stop].read().result(), np.float32)
    except (ValueError, OSError):
        for first in range(start, stop, shard):  # which of them is it?
            last = min(first + shard, stop)
            try:
                array[first:last].read().result()
            except (ValueError, OSError) as error:
                raise LogitsStoreError(
                    f"{within(place, _key(array, first // shard))}: this shard of the entries "
                    f"{first}..{last - 1}{_rows_of(rows, first, last)} is damaged or truncated "
                    f"({error}); {REMEDY}"
                ) from error
        raise


def _check_shards_exist(place, array, wanted, shard, rows) -> None:
    if array.fill_value is None:
        return  # an array of another writer: what it leaves out is zero
    found = {key.decode() for key in key_values(place).list().result()}
    for number in wanted:
        if _key(array, number) not in found:
            first, last = number * shard, min((number + 1) * shard, array.shape[0])
            raise LogitsStoreError(
                f"{within(place, _key(array, number))}: this shard of the entries "
                f"{first}..{last - 1}{_rows_of(rows, first, last)} is missing; {REMEDY}"
            )


def _rows_of(rows, first, last) -> str:
    return "" if rows is None else f", {rows.name(first)} to {rows.name(last - 1)},"


def _key(array: ts.TensorStore, shard: int) -> str:
    return ".".join([str(shard), *("0" for _ in array.shape[1:])])
