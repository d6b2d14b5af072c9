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

Files of a store: manifest.json has counts, hashes, the dtype, the CF model's name, what the logits
were made from and statistics of their softmax. It names the folder beside it of the values:
ids.npz has the ids themselves, so that a mismatch can be told in words; each array is a zarr array,
whose chunks (shards here) are files of about a megabyte. A new store is written into a new folder;
then the manifest, replaced in one piece, names that one, and the old folder is deleted.

Axis letters: E stored events, K kept logits.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.provenance import Provenance

FORMAT = 2
MANIFEST, IDS = "manifest.json", "ids.npz"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = {
    "factorised": ("vectors", "item_table", "item_bias"),
    "dense": ("logits",),
    "topk": ("values", "items", "floor"),
}
PER_ITEM = ("item_table", "item_bias")  # the other arrays are per event
_AXES = {"vectors": "ED", "item_table": "ID", "item_bias": "I", "logits": "EI"}
_AXES |= {"values": "EK", "items": "EK", "floor": "E"}
_NOUNS = {"E": "events", "I": "items", "D": "columns", "K": "columns"}
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 64 << 20  # what is copied or checked at once
_CACHE_BYTES = 256 << 20

StorePath = Path | str
TRAIN_CF = "launch/train_cf.py"
IMPORT = "launch/import_cf_logits.py"
EXPORT = "launch/export_cf_logits.py"


class LogitsStoreError(UserError):
    """CF logits that are missing or damaged, or that do not fit the data they are used with."""


@dataclass(frozen=True)
class Origin:
    """Whose logits a store holds.

    Attributes:
      cf_model: the CF model's name, for people.
      model: what tells the model from all others: stores of one `model` go together. By default
        its name.
      history_length: the longest history that an event depends on; None: no limit.
      made_by: TRAIN_CF, IMPORT or EXPORT.
      inputs: what the logits were made from, see Provenance.
    """

    cf_model: str
    model: str = ""
    history_length: int | None = None
    made_by: str = IMPORT
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The fields of a manifest."""
        return {
            "cf_model": self.cf_model,
            "model": self.model or self.cf_model,
            "history_length": self.history_length,
            "made_from": asdict(Provenance("CF logits store", self.made_by, self.inputs)),
        }


REMEDY = "run launch/train_cf.py for this data, or import your own logits for it again"


def unusable(what: str) -> LogitsStoreError:
    """The error of a store that has to be written again: what is wrong, and how."""
    return LogitsStoreError(f"{what}; {REMEDY}")


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


def kind_of(names: Collection[str]) -> str | None:
    """The kind of store that arrays of these names make; None if they make none."""
    for kind, known in KINDS.items():
        if set(known) - {"item_bias"} <= set(names) <= set(known):
            return kind
    return None


def _dtype_of(name: str, manifest: Mapping) -> str:
    if name == "items":
        return "int32"
    return "float32" if name in (*PER_ITEM, "floor") else manifest.get("dtype", "float32")


def _zarr(path: StorePath) -> dict:
    return {"driver": "zarr", "kvstore": key_values(path).spec().to_json()}


def open_array(folder: StorePath, name: str, manifest: Mapping) -> ts.TensorStore:
    """Opens an array for reading.

    Raises LogitsStoreError if it is missing, damaged, or not of the manifest's shape and dtype.
    """
    path, shape, dtype = within(folder, name), manifest["arrays"][name], _dtype_of(name, manifest)
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    try:
        array = ts.open(_zarr(path), open=True, read=True, context=context).result()
        if array.fill_value is not None:  # a shard that is missing is an error, not NaN
            spec = _zarr(path) | {"fill_missing_data_reads": False}
            array = ts.open(spec, open=True, read=True, context=context).result()
    except (ValueError, OSError) as error:
        raise unusable(f"{path} cannot be opened ({error})") from error
    found = f"{array.dtype.name} of shape {list(array.shape)}"
    if found != (expected := f"{dtype} of shape {shape}"):
        raise unusable(f"{path}: {found}, expected {expected}")
    return array


def create_array(folder: StorePath, name: str, manifest: Mapping) -> ts.TensorStore:
    """A new array. It has a fill value, so that a lost shard is noticed."""
    shape, dtype = manifest["arrays"][name], ts.dtype(_dtype_of(name, manifest))
    row_bytes = dtype.numpy_dtype.itemsize * int(np.prod(shape[1:]))
    shard_rows = max(1, min(shape[0], _CHUNK_BYTES // max(row_bytes, 1)))
    return ts.open(
        _zarr(within(folder, name)),
        create=True,
        dtype=dtype,
        shape=shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=[shard_rows, *shape[1:]]),
        fill_value=dtype.numpy_dtype.type(-1 if name == "items" else np.nan),
    ).result()


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


@dataclass(frozen=True)
class ArrayChecks:
    """The checks of a store's arrays. Errors name the array below `path` and the event or item.

    Attributes:
      path: of the store, or the user's file that it is made of.
      sequences: the rows that the events belong to.
      num_items: I.
      events_per: 'position' if every event is stored, 'row' if only the last one of every row is.
    """

    path: StorePath
    sequences: ItemSequences
    num_items: int
    events_per: str

    @classmethod
    def of(
        cls,
        path: StorePath,
        shapes: Mapping[str, Sequence[int]],
        sequences: ItemSequences,
        num_items: int,
    ) -> "ArrayChecks":
        """Checks the shapes of arrays, by name, against each other and the data.

        Raises LogitsStoreError naming the array, its size and what was expected.
        """
        if kind_of(shapes) is None:
            raise LogitsStoreError(
                f"{path}: got the arrays {sorted(shapes)}; give either vectors with an item_table "
                "(and perhaps an item_bias), or logits, or values with items and floor"
            )
        num_positions = len(sequences.items)
        expected = {  # by axis the sizes it may have, the same for all arrays
            "E": {len(sequences): "the last of each row", num_positions: "one per flat position"},
            "I": {num_items: "the catalogue, without an item for padding"},
        }
        for name, shape in shapes.items():
            if len(shape) != (rank := len(_AXES[name])):
                raise LogitsStoreError(f"{path}: {name} must have {rank} axes, got shape {shape}")
            for axis, size in zip(_AXES[name], shape, strict=True):
                sizes = expected.setdefault(axis, {size: f"as {name}"})
                if size not in sizes:
                    known = " or ".join(f"{count} ({what})" for count, what in sizes.items())
                    raise LogitsStoreError(
                        f"{path}: {name} has {size} {_NOUNS[axis]}; expected {known}"
                    )
                expected[axis] = {size: sizes[size]}
        events_per = "position" if num_positions in expected["E"] else "row"
        return cls(path, sequences, num_items, events_per)

    def values(self, name: str, start: int, block: np.ndarray) -> None:
        """Checks a block of an array, from row `start` on.

        Raises LogitsStoreError for NaN or infinity, and for `items` outside the catalogue but -1.
        """
        of_items = name == "items"
        bad = (block < -1) | (block >= self.num_items) if of_items else ~np.isfinite(block)
        if not bad.any():
            return
        first = np.unravel_index(int(np.argmax(bad)), bad.shape)
        where = f"{within(self.path, name)}: {self._row(name, start + int(first[0]))}"
        if of_items:
            raise LogitsStoreError(
                f"{where} names item {block[first]}, expected -1 to {self.num_items - 1}"
            )
        column = f", column {first[1]}" if block.ndim == 2 else ""
        raise LogitsStoreError(
            f"{where}{column} is {block[first]}; CF logits must be finite. Find out why the CF "
            "model gave this value (a diverged training, a division by zero, a number beyond the "
            "dtype) and write the logits again; an item that must not be chosen gets a large "
            "negative number, not -inf"
        )

    def shards(self, name: str, array: ts.TensorStore, events: np.ndarray | None = None) -> None:
        """Reads an open array, or only the shards of `events` (int [m]), and checks its values.

        Raises LogitsStoreError for a shard that is missing or damaged, and as `values`.
        """
        layout: Any = array.chunk_layout
        size: int = layout.read_chunk.shape[0]
        num_rows, other_axes = array.shape[0], ".0" * (array.rank - 1)
        every = range(-(-num_rows // size))
        shards = list(every) if events is None else np.unique(events // size).tolist()
        path = within(self.path, name)

        def error(shard: int, what: str) -> LogitsStoreError:
            rows = (shard * size, min((shard + 1) * size, num_rows) - 1)
            first_to_last = " to ".join(self._row(name, row) for row in rows)
            file = within(path, f"{shard}{other_axes}")
            return unusable(f"{file}: this shard, {first_to_last}, is {what}")

        if array.fill_value is not None:  # an array of another writer may leave out what is zero
            found = {key.decode() for key in key_values(path).list().result()}
            for shard in shards:
                if f"{shard}{other_axes}" not in found:
                    raise error(shard, "missing")
        at_once = max(1, block_rows(array.shape) // size)
        for some in (shards[at : at + at_once] for at in range(0, len(shards), at_once)):
            reads = [array[at * size : min((at + 1) * size, num_rows)].read() for at in some]
            for shard, read in zip(some, reads, strict=True):
                try:
                    block = read.result()
                except (ValueError, OSError) as cause:
                    raise error(shard, f"damaged or truncated ({cause})") from cause
                self.values(name, shard * size, block)

    def _row(self, name: str, at: int) -> str:
        """'item 7', or 'event 7 (row 3 of the data, position 2)'."""
        if name in PER_ITEM:
            return f"item {at}"
        if self.events_per == "row":
            return f"event {at} (row {at} of the data)"
        row = self.sequences.row_of(at)
        return f"event {at} (row {row} of the data, position {at - self.sequences.offsets[row]})"
