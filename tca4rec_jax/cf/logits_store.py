"""The CF logits of a split: tensorstore (zarr) arrays and a manifest that names their rows.

Three kinds. 'factorised': a user vector per entry, one item table, optionally an item bias; the
logit of an item is vector . table row + bias. 'dense': the logits of all items per entry, for CF
models that are no inner product or that were trained elsewhere. 'topk': the highest logits of an
entry, their items, and one floor for all others.

An entry belongs to a *flat position* j of an ItemSequences: it was computed from the items before j
in j's row and predicts `items[j]`. A store has one entry per flat position, or one entry per row,
which then stands for the row's last item, the target.

Layout of a store: manifest.json and ids.npz (logits_manifest.py); zarr arrays `vectors`,
`item_table`, `item_bias`, or `logits`, or `values`, `items`, `floor`. logits_writer.py writes it.

Axis letters: R rows, n flat positions, E entries (n or R), m entries read, I items, D width,
K kept.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.cf.logits_arrays import (
    LogitsStoreError,
    Place,
    Rows,
    blocks,
    check_array,
    open_array,
    place_of,
    within,
)
from tca4rec_jax.cf.logits_manifest import (
    MANIFEST,
    check_manifest,
    read_manifest,
)
from tca4rec_jax.cf.scoring import check_history_length
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences

REQUIRED = {
    "factorised": ("vectors", "item_table"),
    "dense": ("logits",),
    "topk": ("values", "items", "floor"),
}
_OPTIONAL = {"factorised": ("item_bias",)}
_RANKS = {"item_bias": 1, "floor": 1}  # the others have two axes
_ITEM_AXIS = {"item_table": 0, "item_bias": 0, "logits": 1}
PER_ITEM = ("item_table", "item_bias")


@dataclass(frozen=True, eq=False)
class LogitsStore:
    """An open, validated store.

    Attributes:
      path: its directory or URL.
      manifest: what manifest.json says; `manifest["cf_model"]` names the CF model.
      item_table: float32 [I, D], None for a dense or topk store.
      item_bias: float32 [I] or None.
    """

    path: Place
    manifest: dict
    item_table: np.ndarray | None
    item_bias: np.ndarray | None
    _arrays: dict[str, ts.TensorStore]
    _last_positions: np.ndarray

    @property
    def kind(self) -> str:
        """'factorised', 'dense' or 'topk'."""
        return self.manifest["kind"]

    @property
    def width(self) -> int:
        """Of what `read` gives: D of a factorised store, else I."""
        factorised = self.kind == "factorised"
        return self.item_table.shape[1] if factorised else self.manifest["num_items"]

    def read(self, flat_positions: np.ndarray) -> np.ndarray:
        """The entries of flat positions, in their order (repeats allowed).

        Args:
          flat_positions: int64 [m].

        Returns:
          float32 [m, D] user vectors of a factorised store, otherwise [m, I] logits.

        Raises:
          LogitsStoreError: a position outside the rows, or one that is not the last of its row
            although the store has one entry per row.
        """
        entries_m = self._entry_of(np.asarray(flat_positions, np.int64))
        if not entries_m.size:
            return np.zeros((0, self.width), np.float32)
        pending = [self._arrays[name][entries_m].read() for name in self._arrays]
        read = [np.asarray(future.result()) for future in pending]
        if self.kind == "topk":
            return spread(*read, self.manifest["num_items"])
        return read[0].astype(np.float32, copy=False)

    def logits(self, flat_positions: np.ndarray) -> np.ndarray:
        """CF logits of all items before flat positions, float32 [m, I], whatever the kind."""
        entries = self.read(flat_positions)
        if self.item_table is None:
            return entries
        logits_mxI = entries @ self.item_table.T
        return logits_mxI if self.item_bias is None else logits_mxI + self.item_bias[None, :]

    def _entry_of(self, flat_positions: np.ndarray) -> np.ndarray:
        num_positions = self.manifest["num_positions"]
        outside = (flat_positions < 0) | (flat_positions >= num_positions)
        if outside.any():
            raise LogitsStoreError(
                f"{self.path}: flat position {flat_positions[np.argmax(outside)]} is not one of "
                f"the {num_positions} of these rows"
            )
        if self.manifest["entries_per"] == "position":
            return flat_positions
        row_m = np.searchsorted(self._last_positions, flat_positions)
        not_last = self._last_positions[row_m] != flat_positions
        if not_last.any():
            at = int(np.argmax(not_last))
            raise LogitsStoreError(
                f"{self.path} has one entry per row, for its last item; flat position "
                f"{flat_positions[at]} lies earlier in row {row_m[at]}. Supervise only the last "
                "item of a row, or store logits for every flat position"
            )
        return row_m


def split_place(logits: str, workdir: Path, split: str) -> Place:
    """Where the store of a split lies: below `config.cf.logits`, or workdir/cf/logits if empty."""
    base = place_of(logits) if logits else Path(workdir) / "cf" / "logits"
    return within(base, split)


def open_store(
    path: Place,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    history_length: int | None = None,
    positions: np.ndarray | None = None,
) -> LogitsStore:
    """Opens the store of `sequences` and checks it, values included.

    Args:
      path: the directory or URL of the store.
      sequences: the rows it must have been written for.
      catalogue: the items it must have been written for.
      history_length: the history its entries should have seen, if that matters.
      positions: the flat positions that this process will read: only their shards are read and
        checked. None for all.

    Raises:
      LogitsStoreError: there is no store, it is damaged, its counts or hashes are not those of the
        rows and the catalogue, or a value is NaN or infinite. The message names the file, the row,
        what was expected and what to do.
      ValueError: a history longer than the CF model reads.
    """
    place = place_of(path)
    manifest = read_manifest(place)
    kind, named = manifest.get("kind"), set(manifest["arrays"])
    if kind not in REQUIRED or not set(REQUIRED[kind]) <= named <= array_names(kind):
        raise LogitsStoreError(f"{within(place, MANIFEST)} is incomplete; write the store again")
    check_manifest(place, manifest, sequences, catalogue)
    if manifest["history_length"] is not None:
        check_history_length(history_length, manifest["history_length"])
    store = open_arrays(place, manifest, sequences)
    entries_per = check_shapes(place, _arrays_of(store), sequences, catalogue)
    if entries_per != manifest["entries_per"] and len(sequences) != len(sequences.items):
        raise LogitsStoreError(f"{place}: the entries are not one per {manifest['entries_per']}")
    entries = None if positions is None else store._entry_of(np.asarray(positions, np.int64))
    rows = Rows(sequences, manifest["entries_per"])
    for name, array in store._arrays.items():
        check_array(within(place, name), array, rows, entries)
    if kind == "topk":
        _check_items(within(place, "items"), store, entries)
    return store


def spread(values_mxK, items_mxK, floor_m, num_items: int) -> np.ndarray:
    """Top-k entries as dense logits, float32 [m, I]; item -1 is nothing."""
    logits_mxI = np.repeat(floor_m.astype(np.float32)[:, None], num_items + 1, axis=1)
    np.put_along_axis(logits_mxI, items_mxK.astype(np.int64), values_mxK.astype(np.float32), axis=1)
    return logits_mxI[:, :num_items]


def dtype_of(name: str, dtype: str) -> str:
    return {"items": "int32", "floor": "float32"}.get(
        name, "float32" if name in PER_ITEM else dtype
    )


def open_arrays(place: Place, manifest: dict, sequences: ItemSequences) -> LogitsStore:
    dtype, per_item, arrays = manifest.get("dtype", "float32"), {}, {}
    for name in (*REQUIRED[manifest["kind"]], *_OPTIONAL.get(manifest["kind"], ())):
        if name not in manifest["arrays"]:
            continue
        array = open_array(within(place, name), manifest["arrays"][name], dtype_of(name, dtype))
        if name in PER_ITEM:
            check_array(within(place, name), array, None)
            per_item[name] = array.read().result()
        else:
            arrays[name] = array
    return LogitsStore(
        path=place,
        manifest=manifest,
        item_table=per_item.get("item_table"),
        item_bias=per_item.get("item_bias"),
        _arrays=arrays,
        _last_positions=sequences.last_positions,
    )


def _arrays_of(store: LogitsStore) -> dict:
    per_item = {name: getattr(store, name) for name in PER_ITEM}
    return store._arrays | {name: array for name, array in per_item.items() if array is not None}


def array_names(kind: str) -> set[str]:
    return {*REQUIRED[kind], *_OPTIONAL.get(kind, ())}


def check_shapes(place, arrays, sequences, catalogue) -> str:
    """Checks ranks and sizes against each other; returns 'position' or 'row'."""
    for name, array in arrays.items():
        rank = _RANKS.get(name, 2)
        if len(array.shape) != rank:
            raise LogitsStoreError(
                f"{place}: {name} must have {rank} axes, got shape {tuple(array.shape)}"
            )
    if "vectors" in arrays:
        widths = arrays["vectors"].shape[1], arrays["item_table"].shape[1]
        if widths[0] != widths[1]:
            raise LogitsStoreError(
                f"{place}: vectors are {widths[0]} wide, the item_table is {widths[1]} wide"
            )
    for name in set(arrays) & set(_ITEM_AXIS):
        count = arrays[name].shape[_ITEM_AXIS[name]]
        if count != catalogue.num_items:
            padding = count == catalogue.num_items + 1
            hint = "; is one of them for padding? leave it out" if padding else ""
            raise LogitsStoreError(
                f"{place}: {name} covers {count} items, the catalogue has {catalogue.num_items}"
                f"{hint}"
            )
    if "values" in arrays and not (
        arrays["values"].shape == arrays["items"].shape
        and arrays["floor"].shape[0] == arrays["values"].shape[0]
    ):
        shapes = {name: tuple(arrays[name].shape) for name in REQUIRED["topk"]}
        raise LogitsStoreError(f"{place}: values, items and floor have the shapes {shapes}")
    kinds = {
        name: entries_per(place, name, array.shape[0], sequences)
        for name, array in arrays.items()
        if name not in PER_ITEM
    }
    return next(iter(kinds.values()))


def entries_per(place: Place, name: str, count: int, sequences: ItemSequences) -> str:
    """'position' or 'row'; raises LogitsStoreError if `count` entries are neither."""
    if count == len(sequences.items):
        return "position"
    if count == len(sequences):
        return "row"
    raise LogitsStoreError(
        f"{place}: {name} has {count} entries; expected {len(sequences)} (one per row, for its "
        f"last item) or {len(sequences.items)} (one per flat position)"
    )


def _check_items(place: Place, store: LogitsStore, entries) -> None:
    items = store._arrays["items"]
    array = items if entries is None else items[np.unique(entries)]
    num_items = store.manifest["num_items"]
    for start, block in blocks(array):
        wrong = (block < -1) | (block >= num_items)
        if wrong.any():
            at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            raise LogitsStoreError(
                f"{place}: entry {start + at[0]} names item {int(block[at])}, expected -1 to "
                f"{num_items - 1}"
            )
