"""Writes a CF logits store (logits_format.py says what that is).

On a disk it is written beside its path and renamed when complete; in a bucket its manifest is
written last.

Axis letters: R rows, n flat positions, m events of a block, I items, D width, K kept logits.
"""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.cf.logits_format import (
    DTYPES,
    FORMAT,
    IDS,
    KINDS,
    MANIFEST,
    PER_ITEM,
    Describe,
    LogitsStoreError,
    StorePath,
    block_rows,
    blocks,
    check_finite,
    check_shapes,
    create_array,
    describe_event,
    describe_item,
    dtype_of,
    identity,
    key_values,
    kind_of,
    store_path,
    within,
)
from tca4rec_jax.cf.logits_store import LogitsStore, multiply_out
from tca4rec_jax.cf.scoring import LazyRows, temperature_statistics
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.fileio import atomic_path

_SAMPLED = 256  # events that the statistics are made of


def write_store(
    path: StorePath,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    cf_model: str,
    history_length: int | None = None,
    dtype: str = "float32",
    top_k: int | None = None,
    source: Path | None = None,
    **arrays: np.ndarray | LazyRows | None,
) -> None:
    """Writes a store and replaces `path`.

    Args:
      path: the directory or URL of the store.
      sequences: the rows that the events belong to.
      catalogue: the items, in the order of the item axis.
      cf_model: the CF model's name, kept in the manifest.
      history_length: the longest history an event depends on; None if the model has no limit.
      dtype: of vectors, logits and values, one of DTYPES; the rest is float32.
      top_k: keeps the highest logits of an event and one floor for the others, see `highest`; None
        keeps all.
      source: the file of the arrays, which errors then name instead of the store.
      arrays: `vectors` [n or R, D], `item_table` [I, D] and perhaps `item_bias` [I]
        (factorised); or `logits` [n or R, I] (dense, or topk if top_k is given); or `values` [n or
        R, K], `items` (int, -1 fills up) and `floor` [n or R] (topk). Anything that is sliced by
        rows will do (a memory map, scoring.LazyRows); it is copied block by block.

    Raises:
      LogitsStoreError: arrays that do not fit each other, the rows or the catalogue; NaN or
        infinite values.
    """
    path = store_path(path)
    named = source or path
    if dtype not in DTYPES:
        raise LogitsStoreError(f"{named}: dtype is {dtype!r}, expected one of {DTYPES}")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    events_per = check_shapes(named, arrays, sequences, catalogue)
    describe = describe_event(sequences, events_per)
    kind, shapes, parts = _contents(named, arrays, top_k, describe)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "cf_model": cf_model,
        "history_length": history_length,
        "entries_per": events_per,
        **identity(sequences, catalogue),
        "arrays": shapes,
        "dtype": dtype,
    }
    with _new_folder(path) as folder:
        targets = {
            name: create_array(within(folder, name), shape, dtype_of(name, dtype))
            for name, shape in shapes.items()
        }
        for start, name, block in parts:
            of_block = describe_item if name in PER_ITEM else describe
            _write_block(targets[name], within(named, name), start, block, of_block)
        _complete(folder, manifest, sequences, catalogue)


def highest(logits_mxI: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The highest logits of each event, and what stands for the others.

    Args:
      logits_mxI: float32 [m, I].
      count: K, 1..I.

    Returns:
      values float32 [m, K]; their items int64 [m, K], ascending; the floor float32 [m], log mean
      exp of the others, so that their mass at temperature 1 stays the same.
    """
    items_mxK = np.sort(np.argpartition(-logits_mxI, count - 1, axis=1)[:, :count], axis=1)
    values_mxK = np.take_along_axis(logits_mxI, items_mxK, axis=1)
    rest_mxI = logits_mxI.astype(np.float64)
    np.put_along_axis(rest_mxI, items_mxK, -np.inf, axis=1)
    others = logits_mxI.shape[1] - count
    if not others:
        return values_mxK, items_mxK, values_mxK.min(axis=1)
    top_m = rest_mxI.max(axis=1)
    floor_m = top_m + np.log(np.exp(rest_mxI - top_m[:, None]).sum(axis=1) / others)
    return values_mxK, items_mxK, floor_m.astype(np.float32)


def _write_block(
    target: ts.TensorStore, named: StorePath, start: int, block: np.ndarray, describe: Describe
) -> None:
    with np.errstate(over="ignore"):
        block = block.astype(target.dtype.numpy_dtype)
    check_finite(named, start, block, describe)
    target[start : start + len(block)].write(block).result()


_Parts = Iterator[tuple[int, str, np.ndarray]]  # first row, array name, block


def _contents(
    named: StorePath, arrays: Mapping, top_k: int | None, describe: Describe
) -> tuple[str, dict[str, list[int]], _Parts]:
    """The kind of store that arrays make, the shapes of its arrays and their blocks."""
    kind = kind_of(set(arrays)) or ""
    if kind == "topk" or not top_k:
        return kind, {name: list(array.shape) for name, array in arrays.items()}, _parts(arrays)
    logits = arrays["logits"] if kind == "dense" else _products(**arrays)
    shape = [logits.shape[0], min(top_k, logits.shape[1])]
    shapes = {"values": shape, "items": shape, "floor": shape[:1]}
    return "topk", shapes, _highest_parts(named, logits, describe, shape[1])


def _parts(arrays: Mapping) -> _Parts:
    """The blocks of arrays as they are."""
    for name, array in arrays.items():
        for start, block in blocks(array, np.int64 if name == "items" else np.float32):
            yield start, name, block


def _highest_parts(path: StorePath, logits, describe: Describe, count: int) -> _Parts:
    """The blocks of the topk arrays made of logits [E, I]."""
    for start, block in blocks(logits):
        check_finite(within(path, "logits"), start, block, describe)
        for name, part in zip(KINDS["topk"], highest(block, count), strict=True):
            yield start, name, part


def _products(vectors, item_table, item_bias=None) -> LazyRows:
    """The logits of factorised arrays, [E, I]."""
    table_IxD = np.asarray(item_table, np.float32)
    bias_I = None if item_bias is None else np.asarray(item_bias, np.float32)

    def compute(start: int, stop: int) -> np.ndarray:
        return multiply_out(np.asarray(vectors[start:stop], np.float32), table_IxD, bias_I)

    return LazyRows((np.shape(vectors)[0], len(table_IxD)), compute)


def _sample(store: LogitsStore) -> np.ndarray:
    """Flat positions of events, evenly spread; fewer where their logits would take much memory."""
    positions = store.positions
    count = min(_SAMPLED, len(positions), block_rows((0, store.manifest["num_items"])))
    return positions[np.linspace(0, len(positions) - 1, count).astype(np.int64)]


@contextlib.contextmanager
def _new_folder(path: StorePath) -> Iterator[StorePath]:
    """Where a store is written: beside a path on a disk, renamed when complete; else the bucket."""
    if isinstance(path, Path):
        with atomic_path(path) as folder:
            folder.mkdir()
            yield folder
    else:
        key_values(path).delete_range(ts.KvStore.KeyRange()).result()
        yield path


def _complete(
    folder: StorePath, manifest: dict, sequences: ItemSequences, catalogue: Catalogue
) -> None:
    """Writes the ids, then the manifest with statistics of the written logits."""
    ids = io.BytesIO()
    np.savez_compressed(
        ids,
        item_ids=np.array(catalogue.item_ids, dtype=np.str_),
        user=sequences.user,
        items=sequences.items,
        offsets=sequences.offsets,
    )
    key_values(folder).write(IDS, ids.getvalue()).result()
    store = LogitsStore.of(folder, manifest, sequences)
    statistics = temperature_statistics(store.logits(_sample(store)))
    text = json.dumps(manifest | {"temperature": statistics}, indent=2) + "\n"
    key_values(folder).write(MANIFEST, text.encode()).result()
