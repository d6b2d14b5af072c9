"""Writes a CF logits store (logits_store.py says what that is).

On a disk it is written beside its path and renamed when complete; in a bucket its manifest is
written last.

Axis letters: R rows, n flat positions, E entries, m entries of a block, I items, D width, K kept.
"""

import shutil
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.cf.logits_arrays import (
    DTYPES,
    LogitsStoreError,
    Place,
    Rows,
    blocks,
    check_finite,
    create_array,
    key_values,
    place_of,
    within,
)
from tca4rec_jax.cf.logits_manifest import (
    FORMAT,
    identity,
    temperature_statistics,
    write_ids,
    write_manifest,
)
from tca4rec_jax.cf.logits_store import (
    PER_ITEM,
    REQUIRED,
    array_names,
    check_shapes,
    dtype_of,
    open_arrays,
)
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences

_SAMPLED = 256  # entries that the statistics are made of


def write_store(
    path: Place,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    cf_model: str,
    history_length: int | None = None,
    dtype: str = "float32",
    top_k: int = 0,
    **arrays: np.ndarray | None,
) -> None:
    """Writes a store and replaces `path`.

    Args:
      path: the directory or URL of the store.
      sequences: the rows that the entries belong to.
      catalogue: the items, in the order of the item axis.
      cf_model: the CF model's name, kept in the manifest.
      history_length: the longest history an entry depends on; None if the model has no limit.
      dtype: of vectors, logits and values, one of DTYPES; the rest is float32.
      top_k: keeps the highest logits of an entry, and for the others one floor, which is such that
        the softmax at temperature 1 gives them the same mass together; 0 keeps all.
      arrays: `vectors` [n or R, D], `item_table` [I, D] and perhaps `item_bias` [I]
        (factorised); or `logits` [n or R, I] (dense, or topk if top_k is given); or `values` [n or
        R, K], `items` (int, -1 fills up) and `floor` [n or R] (topk). Anything that is sliced by
        rows will do (a memory map, scoring.LazyRows); it is copied block by block.

    Raises:
      LogitsStoreError: arrays that do not fit each other, the rows or the catalogue; NaN or
        infinite values.
    """
    place = place_of(path)
    arrays = {name: array for name, array in arrays.items() if array is not None}
    kind = _kind_of(place, arrays)
    if dtype not in DTYPES:
        raise LogitsStoreError(f"{place}: dtype is {dtype!r}, expected one of {DTYPES}")
    entries_per = check_shapes(place, arrays, sequences, catalogue)
    rows = Rows(sequences, entries_per)
    if top_k and kind == "factorised":
        kind, arrays = "dense", {"logits": _Products(**arrays)}
    if top_k and kind == "dense":
        kind = "topk"
    on_disk = isinstance(place, Path)
    beside = place.with_name(f".{place.name}.partial") if on_disk else place
    _clear(beside)
    try:
        if kind == "topk" and "logits" in arrays:
            shapes = _write_highest(beside, place, arrays["logits"], rows, dtype, top_k)
        else:
            shapes = {
                name: _write(within(beside, name), within(place, name), array, rows, dtype)
                for name, array in arrays.items()
            }
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "cf_model": cf_model,
            "history_length": history_length,
            "entries_per": entries_per,
            **identity(sequences, catalogue),
            "arrays": shapes,
            "dtype": dtype,
        }
        manifest["temperature"] = _statistics(beside, manifest, sequences)
        write_ids(beside, sequences, catalogue)
        write_manifest(beside, manifest)
        if on_disk:
            _replace(beside, place)
    finally:
        if on_disk:
            shutil.rmtree(beside, ignore_errors=True)


def highest(logits_mxI: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` highest logits of each row, their items (ascending), and the others' floor.

    The floor is log mean exp of the others: their mass at temperature 1 stays the same.
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


def _kind_of(place: Place, arrays: dict) -> str:
    for kind, required in REQUIRED.items():
        if set(required) <= set(arrays) <= array_names(kind):
            return kind
    raise LogitsStoreError(
        f"{place}: got the arrays {sorted(arrays)}; give either vectors with an item_table (and "
        "perhaps an item_bias), or logits, or values with items and floor"
    )


def _write(beside: Place, final: Place, array, rows: Rows, dtype: str) -> list[int]:
    """Copies an array to `beside`; errors name `final`, where it will come to lie."""
    name, shape = beside.name if isinstance(beside, Path) else beside.split("/")[-1], array.shape
    dtype = dtype_of(name, dtype)
    target = create_array(beside, list(shape), dtype)
    numpy_dtype = target.dtype.numpy_dtype
    for start, block in blocks(array):
        with np.errstate(over="ignore"):
            block = block.astype(numpy_dtype)
        check_finite(final, start, block, None if name in PER_ITEM else rows)
        target[start : start + len(block)].write(block).result()
    return list(shape)


def _write_highest(beside, final, logits, rows: Rows, dtype: str, top_k: int) -> dict:
    count = min(top_k, logits.shape[1])
    shapes = {
        "values": [logits.shape[0], count],
        "items": [logits.shape[0], count],
        "floor": [logits.shape[0]],
    }
    targets = {
        name: create_array(within(beside, name), shape, dtype_of(name, dtype))
        for name, shape in shapes.items()
    }
    for start, block in blocks(logits):
        check_finite(within(final, "logits"), start, block, rows)
        for target, part in zip(targets.values(), highest(block, count), strict=True):
            part = part.astype(target.dtype.numpy_dtype)
            check_finite(within(final, "values"), start, part, rows)
            target[start : start + len(part)].write(part).result()
    return shapes


class _Products:
    """A factorised store's logits, computed when they are sliced."""

    def __init__(self, vectors, item_table, item_bias=None):
        self.shape = (np.shape(vectors)[0], np.shape(item_table)[0])
        self._parts = vectors, np.asarray(item_table, np.float32), item_bias

    def __getitem__(self, rows: slice) -> np.ndarray:
        vectors, item_table, item_bias = self._parts
        logits = np.asarray(vectors[rows], np.float32) @ item_table.T
        return logits if item_bias is None else logits + np.asarray(item_bias, np.float32)[None, :]


def _statistics(place: Place, manifest: dict, sequences: ItemSequences) -> dict:
    store = open_arrays(place, manifest, sequences)
    per_row = manifest["entries_per"] == "row"
    positions = sequences.last_positions if per_row else np.arange(len(sequences.items))
    chosen = np.linspace(0, len(positions) - 1, min(_SAMPLED, len(positions))).astype(np.int64)
    return temperature_statistics(store.logits(positions[chosen]))


def _clear(place: Place) -> None:
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    else:
        key_values(place).delete_range(ts.KvStore.KeyRange()).result()


def _replace(beside: Path, path: Path) -> None:
    """Puts the finished directory `beside` in the place of `path`."""
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        beside.rename(path)
        shutil.rmtree(old)
    else:
        beside.rename(path)
