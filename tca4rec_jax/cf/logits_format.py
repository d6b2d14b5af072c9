"""The format of a CF logits store: its path, its arrays, its manifest, and the checks of each.

A store holds the CF logits of a split. An *event* is a flat position j of an ItemSequences: its
logits were computed from the items before j in j's row and predict `items[j]`. A store holds every
event, or the last event of every row alone, which predicts the row's target.

    kind         arrays                          logits of an event
    factorised   vectors [E, D], item_table      vector . row of item_table, plus item_bias
                 [I, D], item_bias [I] or none
    dense        logits [E, I]                   for CF models that are no inner product
    topk         values [E, K], items [E, K],    the highest logits, the items that they belong to
                 floor [E]                       (-1: none), and one logit for all other items

Files of a store: manifest.json has counts, hashes, the dtype, the CF model's name and statistics of
its softmax; ids.npz has the ids themselves, so that a mismatch can be told in words; each array is
a zarr array, whose chunks (shards here) are files of about a megabyte.

Axis letters: E stored events, I items, D width, K kept logits.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError

FORMAT = 1
MANIFEST, IDS = "manifest.json", "ids.npz"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = {
    "factorised": ("vectors", "item_table", "item_bias"),
    "dense": ("logits",),
    "topk": ("values", "items", "floor"),
}
PER_ITEM = ("item_table", "item_bias")  # the other arrays are per event
REMEDY = "run launch/train_cf.py for this data, or import your own logits for it again"
_OPTIONAL = {"item_bias"}
_RANKS = {"item_bias": 1, "floor": 1}  # the others have two axes
_ITEM_AXIS = {"item_table": 0, "item_bias": 0, "logits": 1}
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2", "int32": "<i4"}
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20  # what is copied or checked at once
_CACHE_BYTES = 256 << 20

StorePath = Path | str
Describe = Callable[[int], str]  # index along an array's first axis -> its name in messages


class LogitsStoreError(UserError):
    """CF logits that are missing or damaged, or that do not fit the data they are used with."""


# Paths


def store_path(path: Path | str) -> StorePath:
    """A URL of a bucket (gs://bucket/logits, whatever tensorstore knows) as it is, else a Path."""
    return str(path).rstrip("/") if "://" in str(path) else Path(path)


def within(path: StorePath, name: str) -> StorePath:
    """The path of `name` below a path."""
    return path / name if isinstance(path, Path) else f"{path}/{name}"


def key_values(path: StorePath) -> ts.KvStore:
    """The files below a path, by their names."""
    if isinstance(path, Path):
        return ts.KvStore.open({"driver": "file", "path": f"{path.absolute()}/"}).result()
    return ts.KvStore.open(f"{path}/").result()


# Arrays


def kind_of(names: set[str]) -> str | None:
    """The kind of store that arrays of these names make; None if they make none."""
    for kind, known in KINDS.items():
        if set(known) - _OPTIONAL <= names <= set(known):
            return kind
    return None


def dtype_of(name: str, dtype: str) -> str:
    """The dtype of an array in a store of `dtype`."""
    fixed = {"items": "int32", "floor": "float32", "item_table": "float32", "item_bias": "float32"}
    return fixed.get(name, dtype)


def _zarr(path: StorePath) -> dict:
    return {"driver": "zarr", "kvstore": key_values(path).spec().to_json()}


def open_array(path: StorePath, shape: list[int], dtype: str) -> ts.TensorStore:
    """Opens an array for reading.

    Raises:
      LogitsStoreError: it is missing, damaged, or not of this shape and dtype.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        array = ts.open(_zarr(path), open=True, read=True, context=context).result()
    except (ValueError, OSError) as error:
        raise LogitsStoreError(f"{path} cannot be opened ({error}); {REMEDY}") from error
    if list(array.shape) != shape or array.dtype.name != dtype:
        raise LogitsStoreError(
            f"{path}: {array.dtype.name} of shape {list(array.shape)}, expected {dtype} of "
            f"shape {shape}; {REMEDY}"
        )
    return array


def create_array(path: StorePath, shape: list[int], dtype: str) -> ts.TensorStore:
    """A new array. What is never written reads as NaN (or -1), so that a lost shard is noticed."""
    row_bytes = ts.dtype(dtype).numpy_dtype.itemsize * int(np.prod(shape[1:]))
    metadata = {
        "dtype": _ZARR_DTYPES[dtype],
        "shape": shape,
        "chunks": [max(1, min(shape[0], _CHUNK_BYTES // max(row_bytes, 1))), *shape[1:]],
        "fill_value": -1 if dtype == "int32" else "NaN",
    }
    return ts.open(_zarr(path) | {"metadata": metadata}, create=True).result()


def block_rows(shape: tuple[int, ...]) -> int:
    """How many rows of an array are copied or checked at once."""
    return max(1, _BLOCK_BYTES // (4 * max(int(np.prod(shape[1:])), 1)))


def blocks(array: Any, dtype: type = np.float32) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows as `dtype`) of whatever is sliced by rows: some megabytes at a time."""
    step = block_rows(array.shape)
    for start in range(0, array.shape[0], step):
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as infinite
            yield start, np.asarray(array[start : start + step], dtype)


def identity(sequences: ItemSequences, catalogue: Catalogue) -> dict:
    """The fields of a manifest that tie a store to its data."""
    return {
        "num_rows": len(sequences),
        "num_positions": len(sequences.items),
        "num_items": catalogue.num_items,
        "rows_hash": sequences.content_hash(),
        "catalogue_hash": catalogue.content_hash(),
    }


# Checks of arrays


def check_shapes(
    path: StorePath, arrays: Mapping, sequences: ItemSequences, catalogue: Catalogue
) -> str:
    """Checks the shapes of a store's arrays against each other and the data.

    Args:
      path: of the store or the user's file, for messages.
      arrays: anything with a `shape`, by the names of KINDS.

    Returns:
      'position' if the arrays hold every event, 'row' if they hold the last event of every row.

    Raises:
      LogitsStoreError: naming the array, its shape and what was expected.
    """
    if kind_of(set(arrays)) is None:
        raise LogitsStoreError(
            f"{path}: got the arrays {sorted(arrays)}; give either vectors with an item_table (and "
            "perhaps an item_bias), or logits, or values with items and floor"
        )
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    for name, shape in shapes.items():
        rank = _RANKS.get(name, 2)
        if len(shape) != rank:
            raise LogitsStoreError(f"{path}: {name} must have {rank} axes, got shape {shape}")
    if "vectors" in shapes and shapes["vectors"][1] != shapes["item_table"][1]:
        raise LogitsStoreError(
            f"{path}: vectors are {shapes['vectors'][1]} wide, the item_table is "
            f"{shapes['item_table'][1]} wide"
        )
    for name in set(shapes) & set(_ITEM_AXIS):
        count = shapes[name][_ITEM_AXIS[name]]
        if count != catalogue.num_items:
            padding = count == catalogue.num_items + 1
            hint = "; is one of them for padding? leave it out" if padding else ""
            raise LogitsStoreError(
                f"{path}: {name} covers {count} items, the catalogue has "
                f"{catalogue.num_items}{hint}"
            )
    if "values" in shapes and not (
        shapes["values"] == shapes["items"] and shapes["floor"] == shapes["values"][:1]
    ):
        raise LogitsStoreError(f"{path}: values, items and floor have the shapes {shapes}")
    name = next(name for name in shapes if name not in PER_ITEM)
    if (count := shapes[name][0]) not in (len(sequences.items), len(sequences)):
        raise LogitsStoreError(
            f"{path}: {name} has {count} events; expected {len(sequences)} (the last of each row) "
            f"or {len(sequences.items)} (one per flat position)"
        )
    return "position" if count == len(sequences.items) else "row"


def describe_event(sequences: ItemSequences, events_per: str) -> Describe:
    """Names stored events: 'event 7 (row 3 of the data, position 2)'."""

    def describe(event: int) -> str:
        if events_per == "row":
            return f"event {event} (row {event} of the data)"
        row = sequences.row_of(event)
        return f"event {event} (row {row} of the data, position {event - sequences.offsets[row]})"

    return describe


def describe_item(item: int) -> str:
    """Names rows of arrays per item: 'item 7'."""
    return f"item {item}"


def check_finite(path: StorePath, start: int, block: np.ndarray, describe: Describe) -> None:
    """Raises LogitsStoreError if a block of an array (from row `start` on) has NaN or infinity."""
    bad = ~np.isfinite(block)
    if not bad.any():
        return
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    column = f", column {first[1]}" if block.ndim == 2 else ""
    raise LogitsStoreError(
        f"{path}: {describe(start + int(first[0]))}{column} is {block[first]}; CF logits must be "
        "finite. Find out why the CF model gave this value (a diverged training, a division by "
        "zero, a number beyond the dtype) and write the logits again; an item that must not be "
        "chosen gets a large negative number, not -inf"
    )


def check_items(
    path: StorePath, start: int, block: np.ndarray, describe: Describe, *, num_items: int
) -> None:
    """Raises LogitsStoreError if a block of the array `items` names none of the catalogue's."""
    wrong = (block < -1) | (block >= num_items)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        raise LogitsStoreError(
            f"{path}: {describe(start + int(at[0]))} names item {int(block[at])}, expected -1 to "
            f"{num_items - 1}"
        )


def check_shards(
    path: StorePath,
    array: ts.TensorStore,
    describe: Describe,
    events: np.ndarray | None = None,
    check_block: Callable = check_finite,
) -> None:
    """Reads an array, or only the shards of some events, and checks that all is there and sound.

    Args:
      path: where the array lies.
      array: an open array.
      describe: names its rows in messages.
      events: int [m], the rows that matter here; None for all.
      check_block: checks the values, as check_finite.

    Raises:
      LogitsStoreError: a shard is missing or damaged, or a value wrong; the message names the file
        and the event, row or item.
    """
    layout: Any = array.chunk_layout
    size: int = layout.read_chunk.shape[0]
    num_rows = array.shape[0]
    wanted = np.arange(-(-num_rows // size)) if events is None else np.unique(events // size)

    def error(shard: int, what: str) -> LogitsStoreError:
        first, last = shard * size, min((shard + 1) * size, num_rows) - 1
        file = within(path, _shard_file(array, shard))
        return LogitsStoreError(
            f"{file}: this shard, {describe(first)} to {describe(last)}, is {what}; {REMEDY}"
        )

    if array.fill_value is not None:  # an array of another writer may leave out what is zero
        found = {key.decode() for key in key_values(path).list().result()}
        for shard in wanted.tolist():
            if _shard_file(array, shard) not in found:
                raise error(shard, "missing")
    per_block = max(1, block_rows(array.shape) // size)
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
        for first in range(0, len(run), per_block):
            some = run[first : first + per_block]
            start, stop = int(some[0]) * size, min((int(some[-1]) + 1) * size, num_rows)
            try:
                block = array[start:stop].read().result()
            except (ValueError, OSError):
                for shard in some.tolist():  # which of them is it?
                    try:
                        array[shard * size : min((shard + 1) * size, num_rows)].read().result()
                    except (ValueError, OSError) as cause:
                        raise error(shard, f"damaged or truncated ({cause})") from cause
                raise
            check_block(path, start, block, describe)


def _shard_file(array: ts.TensorStore, shard: int) -> str:
    return ".".join([str(shard), *("0" for _ in array.shape[1:])])
