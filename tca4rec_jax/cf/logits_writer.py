"""Writes a CF logits store (logits_format.py says what that is).

On a disk it is written beside its path and renamed when complete; in a bucket its manifest is
written last.

Axis letters: m events of a block, K kept logits.
"""

import contextlib
import dataclasses
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
    ArrayChecks,
    LogitsStoreError,
    StorePath,
    block_rows,
    blocks,
    create_array,
    identity,
    key_values,
    kind_of,
    store_path,
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
    """Writes the store of some rows and a catalogue, and replaces `path` (a folder or a URL).

    `arrays` are those of a kind of store (logits_format.py), whatever is sliced by rows (a memory
    map, scoring.LazyRows): they are copied block by block. `dtype` (of DTYPES) is that of vectors,
    logits and values; the rest is float32. `top_k` keeps the highest logits of an event and one
    floor for the others, see `highest`; None keeps all. The manifest keeps `cf_model`, the CF
    model's name, and `history_length`, the longest history an event depends on (None: no limit).

    Raises LogitsStoreError for arrays that do not fit each other, the rows or the catalogue, and
    for NaN or infinite values; it names `source`, the file of the arrays, instead of the store.
    """
    path = store_path(path)
    named = source or path
    if dtype not in DTYPES:
        raise LogitsStoreError(f"{named}: dtype is {dtype!r}, expected one of {DTYPES}")
    given = {name: array for name, array in arrays.items() if array is not None}
    shapes = {name: list(array.shape) for name, array in given.items()}
    checks = ArrayChecks.of(named, shapes, sequences, catalogue.num_items)
    shapes, parts = _contents(given, top_k, checks)
    manifest = {
        "format": FORMAT,
        "kind": kind_of(shapes),
        "cf_model": cf_model,
        "history_length": history_length,
        "entries_per": checks.events_per,
        **identity(sequences, catalogue),
        "arrays": shapes,
        "dtype": dtype,
    }
    with atomic_path(path) if isinstance(path, Path) else contextlib.nullcontext(path) as folder:
        key_values(folder).delete_range(ts.KvStore.KeyRange()).result()
        targets = {name: create_array(folder, name, manifest) for name in shapes}
        for start, name, block in parts:
            with np.errstate(over="ignore"):
                block = block.astype(targets[name].dtype.numpy_dtype)
            checks.values(name, start, block)
            targets[name][start : start + len(block)].write(block).result()
        _complete(manifest, dataclasses.replace(checks, path=folder), catalogue)


def highest(logits_mxI: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The highest K = `count` logits of each event, and what stands for the others.

    Returns values float32 [m, K]; their items int64 [m, K], ascending; the floor float32 [m], log
    mean exp of the others, so that their mass at temperature 1 stays the same.
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


def _contents(
    arrays: Mapping, top_k: int | None, checks: ArrayChecks
) -> tuple[dict[str, list[int]], Iterator[tuple[int, str, np.ndarray]]]:
    """The shapes of what arrays are stored as, and its blocks: (first row, array name, rows)."""
    if "values" in arrays or not top_k:
        parts = (
            (start, name, block)
            for name, array in arrays.items()
            for start, block in blocks(array, np.int64 if name == "items" else np.float32)
        )
        return {name: list(array.shape) for name, array in arrays.items()}, parts
    logits = arrays["logits"] if "logits" in arrays else _products(**arrays)
    shape = [logits.shape[0], min(top_k, logits.shape[1])]

    def highest_parts():
        for start, block in blocks(logits):
            checks.values("logits", start, block)
            for name, part in zip(KINDS["topk"], highest(block, shape[1]), strict=True):
                yield start, name, part

    return {"values": shape, "items": shape, "floor": shape[:1]}, highest_parts()


def _products(vectors, item_table, item_bias=None) -> LazyRows:
    """The logits of factorised arrays, [E, I]."""
    table_IxD = np.asarray(item_table, np.float32)
    bias_I = None if item_bias is None else np.asarray(item_bias, np.float32)

    def logits(vectors_mxD: np.ndarray) -> np.ndarray:
        return multiply_out(np.asarray(vectors_mxD, np.float32), table_IxD, bias_I)

    return LazyRows(logits, vectors, len(table_IxD))


def _complete(manifest: dict, checks: ArrayChecks, catalogue: Catalogue) -> None:
    """Writes the ids, then the manifest with statistics of some of the written logits."""
    ids = io.BytesIO()
    np.savez_compressed(
        ids,
        item_ids=np.array(catalogue.item_ids, dtype=np.str_),
        user=checks.sequences.user,
        items=checks.sequences.items,
        offsets=checks.sequences.offsets,
    )
    files = key_values(checks.path)
    files.write(IDS, ids.getvalue()).result()
    store = LogitsStore.of(manifest, checks)
    last = len(store.positions) - 1
    count = min(_SAMPLED, last + 1, block_rows((0, catalogue.num_items)))
    sample = store.positions[np.linspace(0, last, count).astype(np.int64)]
    statistics = temperature_statistics(store.logits(sample))
    text = json.dumps(manifest | {"temperature": statistics}, indent=2) + "\n"
    files.write(MANIFEST, text.encode()).result()
