"""The CF logits of a split on disk: tensorstore (zarr) arrays and a manifest that names their rows.

Two kinds. 'factorised': a user vector per entry, one item table, optionally an item bias; the logit
of an item is vector . table row + bias. 'dense': the logits of all items per entry, for CF models
that are no inner product or that were trained elsewhere.

An entry belongs to a *flat position* j of an ItemSequences: it was computed from the items before j
in j's row and predicts `items[j]`. A store has one entry per flat position, or one entry per row,
which then stands for the row's last item, the target.

Layout of a store: manifest.json; zarr arrays `vectors`, `item_table`, `item_bias` or `logits`, all
float32. It is written beside its path and renamed when complete.

Axis letters: R rows, n flat positions, E entries (n or R), m entries read, I items, D width.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorstore as ts

from tca4rec_jax.cf.logits_arrays import (
    REMEDY,
    LogitsStoreError,
    blocks,
    check_finite,
    open_array,
    write_array,
)
from tca4rec_jax.cf.scoring import check_history_length
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences

FORMAT = 1
MANIFEST = "manifest.json"
ARRAYS = {"factorised": ("vectors", "item_table", "item_bias"), "dense": ("logits",)}


@dataclass(frozen=True, eq=False)
class LogitsStore:
    """An open, validated store.

    Attributes:
      path: its directory.
      manifest: what manifest.json says; `manifest["cf_model"]` names the CF model.
      item_table: float32 [I, D], None for a dense store.
      item_bias: float32 [I] or None.
    """

    path: Path
    manifest: dict
    item_table: np.ndarray | None
    item_bias: np.ndarray | None
    _entries: ts.TensorStore
    _last_positions: np.ndarray

    @property
    def kind(self) -> str:
        """'factorised' or 'dense'."""
        return self.manifest["kind"]

    def read(self, flat_positions: np.ndarray) -> np.ndarray:
        """The entries of flat positions, in their order (repeats allowed).

        Args:
          flat_positions: int64 [m].

        Returns:
          float32 [m, D] of a factorised store, [m, I] of a dense one.

        Raises:
          LogitsStoreError: a position outside the rows, or one that is not the last of its row
            although the store has one entry per row.
        """
        entries_m = self._entry_of(np.asarray(flat_positions, np.int64))
        if not entries_m.size:
            return np.zeros((0, self._entries.shape[1]), np.float32)
        return self._entries[entries_m].read().result()

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


def write_store(
    path: Path | str,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    vectors: np.ndarray | None = None,
    item_table: np.ndarray | None = None,
    item_bias: np.ndarray | None = None,
    logits: np.ndarray | None = None,
    cf_model: str,
    history_length: int | None = None,
) -> None:
    """Writes `vectors` with `item_table` (factorised), or `logits` (dense); replaces `path`.

    Args:
      path: the directory of the store.
      sequences: the rows that the entries belong to.
      catalogue: the items, in the order of the item axis.
      vectors: float [n, D] or [R, D].
      item_table: float [I, D].
      item_bias: float [I].
      logits: float [n, I] or [R, I]; may be a memory map, it is copied block by block.
      cf_model: the CF model's name, kept in the manifest.
      history_length: the longest history an entry depends on; None if the model has no limit.

    Raises:
      LogitsStoreError: arrays that do not fit each other, the rows or the catalogue; NaN or
        infinite values.
    """
    path = Path(path)
    arrays = {"vectors": vectors, "item_table": item_table, "item_bias": item_bias}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if (logits is None) == (not {"vectors", "item_table"} <= set(arrays)):
        raise LogitsStoreError(f"{path}: give either vectors with an item_table, or logits")
    kind = "factorised" if logits is None else "dense"
    if kind == "dense":
        if arrays:
            raise LogitsStoreError(f"{path}: dense logits take no {', '.join(arrays)}")
        arrays = {"logits": logits}
    entries_per = _check_shapes(path, arrays, sequences, catalogue)
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "cf_model": cf_model,
        "history_length": history_length,
        "entries_per": entries_per,
        "num_rows": len(sequences),
        "num_positions": len(sequences.items),
        "num_items": catalogue.num_items,
        "rows_hash": sequences.content_hash(),
        "catalogue_hash": catalogue.content_hash(),
        "arrays": {name: list(np.shape(array)) for name, array in arrays.items()},
        "dtype": "float32",
    }
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            write_array(beside / name, array, path / name, sequences, entries_per)
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_store(
    path: Path | str,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    history_length: int | None = None,
) -> LogitsStore:
    """Opens the store of `sequences` and checks all of it, values included.

    Args:
      path: the directory of the store.
      sequences: the rows it must have been written for.
      catalogue: the items it must have been written for.
      history_length: the history its entries should have seen, if that matters.

    Raises:
      LogitsStoreError: there is no store, it is damaged, its counts or hashes are not those of the
        rows and the catalogue, or a value is NaN or infinite. The message names the file, the row,
        what was expected and what to do.
      ValueError: a history longer than the CF model reads.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_manifest(path, manifest, sequences, catalogue)
    if manifest["history_length"] is not None:
        check_history_length(history_length, manifest["history_length"])
    arrays = {name: open_array(path / name, shape) for name, shape in manifest["arrays"].items()}
    entries_per = _check_shapes(path, arrays, sequences, catalogue)
    if entries_per != manifest["entries_per"] and len(sequences) != len(sequences.items):
        raise LogitsStoreError(f"{path}: the entries are not one per {manifest['entries_per']}")
    for name, array in arrays.items():
        for start, block in blocks(array):
            check_finite(path / name, start, block, sequences, entries_per)
    entries = arrays.pop(ARRAYS[manifest["kind"]][0])
    item_arrays = {name: array.read().result() for name, array in arrays.items()}
    return LogitsStore(
        path=path,
        manifest=manifest,
        item_table=item_arrays.get("item_table"),
        item_bias=item_arrays.get("item_bias"),
        _entries=entries,
        _last_positions=sequences.last_positions,
    )


def import_array(
    source: Path | str,
    path: Path | str,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    cf_model: str = "imported",
    history_length: int | None = None,
) -> None:
    """Writes a dense store from a user's own .npy file of logits [rows or flat positions, items].

    The file is memory-mapped; columns are the catalogue's items in its order, without a column for
    padding.

    Raises:
      LogitsStoreError: no such file, not a two-dimensional array of numbers, a number of rows or
        columns that does not fit (the message gives both numbers), NaN or infinite values.
    """
    source = Path(source)
    try:
        logits = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise LogitsStoreError(
            f"{source} cannot be read as a .npy array of CF logits ({error}); save it with "
            "numpy.save"
        ) from error
    if not isinstance(logits, np.ndarray) or logits.dtype.kind not in "fiu":
        raise LogitsStoreError(f"{source}: expected one .npy array of floating point numbers")
    _check_shapes(source, {"logits": logits}, sequences, catalogue)
    for start, block in blocks(logits):
        entries_per = _entries_per(source, "logits", len(logits), sequences)
        check_finite(source, start, block, sequences, entries_per)
    write_store(
        path,
        sequences,
        catalogue,
        logits=logits,
        cf_model=cf_model,
        history_length=history_length,
    )


def _check_shapes(path, arrays, sequences, catalogue) -> str:
    """Checks ranks and sizes against each other; returns 'position' or 'row'."""
    ranks = {"vectors": 2, "item_table": 2, "item_bias": 1, "logits": 2}
    for name, array in arrays.items():
        if len(array.shape) != ranks[name]:
            raise LogitsStoreError(
                f"{path}: {name} must have {ranks[name]} axes, got shape {tuple(array.shape)}"
            )
    if "logits" in arrays:
        item_counts = {"logits": arrays["logits"].shape[1]}
        entries = "logits"
    else:
        entries = "vectors"
        item_counts = {name: arrays[name].shape[0] for name in arrays if name != "vectors"}
        widths = arrays["vectors"].shape[1], arrays["item_table"].shape[1]
        if widths[0] != widths[1]:
            raise LogitsStoreError(
                f"{path}: vectors are {widths[0]} wide, the item_table is {widths[1]} wide"
            )
    for name, count in item_counts.items():
        if count != catalogue.num_items:
            padding = count == catalogue.num_items + 1
            hint = "; is one of them for padding? leave it out" if padding else ""
            raise LogitsStoreError(
                f"{path}: {name} covers {count} items, the catalogue has {catalogue.num_items}"
                f"{hint}"
            )
    return _entries_per(path, entries, arrays[entries].shape[0], sequences)


def _entries_per(path, name: str, count: int, sequences: ItemSequences) -> str:
    if count == len(sequences.items):
        return "position"
    if count == len(sequences):
        return "row"
    raise LogitsStoreError(
        f"{path}: {name} has {count} entries; expected {len(sequences)} (one per row, for its last "
        f"item) or {len(sequences.items)} (one per flat position)"
    )


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise LogitsStoreError(f"there are no CF logits at {path} (no {MANIFEST}); {REMEDY}")
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise LogitsStoreError(f"{file} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LogitsStoreError(f"{file}: expected a manifest of format {FORMAT}; {REMEDY}")
    kind, names = manifest.get("kind"), set(manifest.get("arrays", ()))
    fields = {"history_length", "entries_per", "rows_hash", "catalogue_hash", "cf_model"}
    required = {"factorised": {"vectors", "item_table"}, "dense": {"logits"}}
    complete = fields <= set(manifest) and kind in required
    if not complete or not required[kind] <= names <= set(ARRAYS[kind]):
        raise LogitsStoreError(f"{file} is incomplete; {REMEDY}")
    return manifest


def _check_manifest(path, manifest, sequences, catalogue) -> None:
    expected = {
        "num_items": ("items in the catalogue", catalogue.num_items),
        "num_rows": ("rows", len(sequences)),
        "num_positions": ("flat positions", len(sequences.items)),
        "catalogue_hash": ("catalogue hash", catalogue.content_hash()),
        "rows_hash": ("hash of the rows", sequences.content_hash()),
    }
    for field, (meaning, value) in expected.items():
        if manifest.get(field) != value:
            raise LogitsStoreError(
                f"{path / MANIFEST}: {field} is {manifest.get(field)}, but the data has {value} "
                f"({meaning}); the logits were written for other data. {REMEDY.capitalize()}"
            )


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
