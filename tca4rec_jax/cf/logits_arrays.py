"""The zarr arrays of a CF logits store: written, opened and checked block by block."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.data.sequences import ItemSequences

REMEDY = "run launch/train_cf.py for this data, or import your own logits for it again"
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20  # what is copied or checked at once
_CACHE_BYTES = 256 << 20


class LogitsStoreError(ValueError):
    """CF logits that are missing or damaged, or that do not fit the data they are used with."""


def _spec(file: Path) -> dict:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{file}/"}}


def open_array(file: Path, shape: list[int]) -> ts.TensorStore:
    """Opens an array for reading; raises LogitsStoreError if it is not float32 of this shape."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        array = ts.open(_spec(file), open=True, read=True, context=context).result()
    except (ValueError, OSError) as error:
        raise LogitsStoreError(f"{file} cannot be opened ({error}); {REMEDY}") from error
    if list(array.shape) != shape or array.dtype != ts.float32:
        raise LogitsStoreError(
            f"{file}: {array.dtype.name} of shape {list(array.shape)}, expected float32 of "
            f"shape {shape}; {REMEDY}"
        )
    return array


def write_array(
    beside: Path, array, final: Path, sequences: ItemSequences, entries_per: str
) -> None:
    """Writes an array as float32 to `beside`; errors name `final`, where it will come to lie."""
    shape = np.shape(array)
    row_bytes = 4 * int(np.prod(shape[1:]))
    chunks = [max(1, min(shape[0], _CHUNK_BYTES // max(row_bytes, 1))), *shape[1:]]
    metadata = {"dtype": "<f4", "shape": shape, "chunks": chunks}
    target = ts.open(_spec(beside) | {"metadata": metadata}, create=True).result()
    for start, block in blocks(array):
        check_finite(final, start, block, sequences, entries_per)
        target[start : start + len(block)].write(block).result()


def blocks(array) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 rows) of an array or tensorstore, a bounded number of bytes at a time."""
    shape = array.shape
    rows = max(1, _BLOCK_BYTES // (4 * max(int(np.prod(shape[1:])), 1)))
    for start in range(0, shape[0], rows):
        block = array[start : min(start + rows, shape[0])]  # tensorstore does not clamp
        block = block.read().result() if isinstance(block, ts.TensorStore) else block
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinite
            yield start, np.asarray(block, np.float32)


def check_finite(
    file: Path, start: int, block: np.ndarray, sequences: ItemSequences, entries_per: str
) -> None:
    """Raises LogitsStoreError if a block (from entry `start` on) holds NaN or infinity."""
    bad = ~np.isfinite(block)
    if not bad.any():
        return
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    index, place = start + int(first[0]), ""
    if file.name not in ("item_table", "item_bias"):
        row = index
        if entries_per == "position":
            row = int(np.searchsorted(sequences.offsets, index, side="right")) - 1
            place = f", place {index - sequences.offsets[row]}"
        place = f" (row {row} of the data{place})"
    column = f", column {first[1]}" if block.ndim == 2 else ""
    raise LogitsStoreError(
        f"{file}: entry {index}{column}{place} is {block[first]}; CF logits must be finite. Find "
        "out why the CF model gave this value (a diverged training, a division by zero) and write "
        "the logits again; an item that must not be chosen gets a large negative number, not -inf"
    )
