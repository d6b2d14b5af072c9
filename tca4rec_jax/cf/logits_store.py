"""The CF logits of a split: opens a store that logits_writer.py wrote, checks it, reads from it.

logits_format.py says what a store is.

Axis letters: m events read, K kept logits.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from tca4rec_jax.cf.logits_format import (
    DTYPES,
    FORMAT,
    IDS,
    KINDS,
    MANIFEST,
    PER_ITEM,
    REMEDY,
    TRAIN_CF,
    ArrayChecks,
    LogitsStoreError,
    StorePath,
    identity,
    key_values,
    kind_of,
    open_array,
    store_path,
    unusable,
    within,
)
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.ranges import FolderName, check

_FIELDS = {"history_length", "entries_per", "rows_hash", "catalogue_hash", "cf_model", "arrays"}
_FIELDS |= {"model", "made_from", "folder", "content_hash"}
_SHOWN = 3  # differing ids in a message


class CFLogits(Protocol):
    """CF logits of L things that may be generated next; those of a LogitsStore are the items."""

    @property
    def cf_items(self) -> CFItems:
        """float32 [L, D] and perhaps [L]; DENSE if `read` gives logits."""

    def read(self, flat_positions: np.ndarray) -> np.ndarray:
        """float32 [m, D], or [m, L] without a table, of flat positions (int64 [m])."""
        ...


@dataclass(frozen=True, eq=False)
class LogitsStore:
    """An open store.

    Training, evaluation and recommending send what `read` gives to the device as it is, with
    `item_table` and `item_bias`, and multiply it out there.

    Attributes:
      path: its directory or URL.
      manifest: what manifest.json says; `manifest["cf_model"]` names the CF model,
        `manifest["content_hash"]` is the SHA-256 of all values.
      item_table, item_bias: float32 [I, D] and [I], or None; both None if dense or topk.
      arrays: the arrays per event, by name.
      sequences: the rows that the store is of.
    """

    path: StorePath
    manifest: dict
    item_table: np.ndarray | None
    item_bias: np.ndarray | None
    arrays: dict[str, ts.TensorStore]
    sequences: ItemSequences

    @classmethod
    def of(cls, path: StorePath, manifest: dict, checks: ArrayChecks) -> "LogitsStore":
        """Opens the arrays below checks.path; only those over items are read and checked.

        Raises LogitsStoreError for an array that is missing, damaged or not of the manifest.
        """
        arrays = {name: open_array(checks.path, name, manifest) for name in manifest["arrays"]}
        per_item = {}
        for name in arrays.keys() & PER_ITEM:
            array = arrays.pop(name)
            checks.shards(name, array)
            per_item[name] = array.read().result()
        table, bias = map(per_item.get, PER_ITEM)
        return cls(path, manifest, table, bias, arrays, checks.sequences)

    @property
    def kind(self) -> str:
        """'factorised', 'dense' or 'topk'."""
        return self.manifest["kind"]

    @property
    def width(self) -> int:
        """The width of what `read` gives: D of a factorised store, else I."""
        return self.manifest["num_items"] if self.item_table is None else self.item_table.shape[1]

    @property
    def cf_items(self) -> CFItems:
        """The item side of what `read` gives."""
        return CFItems(self.item_table, self.item_bias)

    @property
    def positions(self) -> np.ndarray:
        """The flat position of every stored event, int64 [E], in the store's order."""
        if self.manifest["entries_per"] == "row":
            return self.sequences.last_positions
        return np.arange(len(self.sequences.items))

    def read(self, flat_positions: np.ndarray) -> np.ndarray:
        """What the store holds of events at flat positions (int64 [m], in any order, repeated).

        Returns float32 [m, D] user vectors of a factorised store, otherwise [m, I] logits. Raises
        LogitsStoreError for a position outside the rows, or one that is not the last of its row
        although the store holds only those, and for a store that was replaced since it was opened.
        """
        events_m = self.events_at(flat_positions)
        if not events_m.size:
            return np.zeros((0, self.width), np.float32)
        pending = {name: array[events_m].read() for name, array in self.arrays.items()}
        try:
            read = {name: np.asarray(future.result()) for name, future in pending.items()}
        except (ValueError, OSError) as error:
            raise LogitsStoreError(
                f"{self.path} was replaced or damaged while it was read ({error}): start again"
            ) from error
        if self.kind == "topk":
            values_mxK, items_mxK, floor_m = (read[name] for name in KINDS["topk"])
            logits_mxI = np.repeat(floor_m[:, None], self.width + 1, axis=1)
            np.put_along_axis(logits_mxI, items_mxK, values_mxK, axis=1)
            return logits_mxI[:, :-1]  # item -1 is nothing
        (rows,) = read.values()
        return rows.astype(np.float32, copy=False)

    def logits(self, flat_positions: np.ndarray) -> np.ndarray:
        """CF logits of all items, float32 [m, I], multiplied out on the host; as `read`."""
        return multiply_out(self.read(flat_positions), self.item_table, self.item_bias)

    def events_at(self, flat_positions: np.ndarray) -> np.ndarray:
        """The stored events of flat positions, int64 [m]; raises as `read`."""
        positions_m = np.asarray(flat_positions, np.int64)
        num_positions = len(self.sequences.items)
        outside_m = (positions_m < 0) | (positions_m >= num_positions)
        if outside_m.any():
            raise LogitsStoreError(
                f"{self.path}: flat position {positions_m[np.argmax(outside_m)]} is not one of "
                f"the {num_positions} of these rows"
            )
        if self.manifest["entries_per"] == "position":
            return positions_m
        row_m = self.sequences.row_of(positions_m)
        earlier_m = positions_m + 1 < self.sequences.offsets[row_m + 1]
        if earlier_m.any():
            at = int(np.argmax(earlier_m))
            raise LogitsStoreError(
                f"{self.path} holds only the last event of each row; flat position "
                f"{positions_m[at]} lies earlier in row {row_m[at]}. Supervise only the last "
                "item of a row, or store logits for every flat position"
            )
        return row_m


def open_store(
    path: StorePath,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    positions: np.ndarray | None = None,
    cf: Mapping[str, Any] | None = None,
) -> LogitsStore:
    """Opens the store that was written for these rows and this catalogue and checks it, values too.

    Of arrays per event only the shards of `positions` (int64 [m], what this process will read) are
    read and checked; None checks all. `cf` is what settings.store_inputs gives: a store that
    launch/train_cf.py made from others is stale.

    Raises LogitsStoreError if there is no store, it is damaged, its counts or hashes are not those
    of the data, or a value is NaN or infinite. The message names the file, the row, what was
    expected and what to do. Raises StaleError if it was made from others than `cf`.
    """
    path = store_path(path)
    manifest = read_manifest(path)
    made_from = made_from_of(path, manifest)
    if cf is not None and made_from.command == TRAIN_CF:
        made_from.check({"cf": cf}, path)
    folder = within(path, manifest["folder"])
    for field, value in identity(sequences, catalogue).items():
        if manifest.get(field) != value:
            raise unusable(
                f"{within(path, MANIFEST)}: {field} is {manifest.get(field)}, but the data has "
                f"{value}{_difference(folder, sequences, catalogue)}; the logits were written for "
                "other data"
            )
    checks = ArrayChecks.of(folder, manifest["arrays"], sequences, catalogue.num_items)
    if checks.events_per != (events_per := manifest["entries_per"]):
        raise LogitsStoreError(f"{path}: the events are not one per {events_per}")
    store = LogitsStore.of(path, manifest, checks)
    events = None if positions is None else store.events_at(positions)
    for name, array in store.arrays.items():
        checks.shards(name, array, events)
    return store


def split_path(logits: str | None, workdir: Path, split: str) -> StorePath:
    """Where the store of a split lies: below `config.cf.logits`, or workdir/cf/logits."""
    return within(store_path(logits) if logits else Path(workdir) / "cf" / "logits", split)


def multiply_out(
    vectors_mxD: np.ndarray, item_table_IxD: np.ndarray | None, item_bias_I: np.ndarray | None
) -> np.ndarray:
    """CF logits of all items, float32 [m, I]; without a table the vectors are the logits."""
    if item_table_IxD is None:
        return vectors_mxD
    logits_mxI = vectors_mxD @ item_table_IxD.T
    return logits_mxI if item_bias_I is None else logits_mxI + item_bias_I[None, :]


def is_store(path: StorePath) -> bool:
    """Whether a manifest is at a path."""
    return key_values(path).read(MANIFEST).result().state == "value"


def read_manifest(path: StorePath) -> dict:
    """What manifest.json says; raises LogitsStoreError if there is none or not a complete one."""
    file, found = within(path, MANIFEST), key_values(path).read(MANIFEST).result()
    if found.state != "value":
        raise unusable(f"there are no CF logits at {path} (no {MANIFEST})")
    with reading(file, "manifest of CF logits", remedy=REMEDY):
        manifest = json.loads(found.value)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise unusable(f"expected a manifest of format {FORMAT}")
        if "writing" in manifest and "folder" not in manifest:
            raise unusable(f"{path} is being written, or was when the writer was ended")
        sizes = [size for shape in manifest["arrays"].values() for size in shape]
        if (
            not set(manifest) >= _FIELDS
            or kind_of(manifest["arrays"]) != manifest["kind"]
            or manifest.get("dtype", "float32") not in DTYPES
            or any(type(size) is not int or size < 0 for size in sizes)
        ):
            raise unusable("it is incomplete")
        check("folder", manifest["folder"], FolderName)
        return manifest


def made_from_of(path: StorePath, manifest: Mapping) -> Provenance:
    """What the logits were made from; raises StaleError if the manifest is damaged."""
    return Provenance.from_fields(manifest["made_from"], within(path, MANIFEST))


def check_one_model(*paths: StorePath) -> None:
    """Checks the `model` (see Origin) of stores that are used together, as their manifests say.

    Raises LogitsStoreError if one is missing or of another CF model than the first.
    """
    first, *others = ((path, read_manifest(path)) for path in paths)
    made_from = made_from_of(*first)
    for path, manifest in others:
        if manifest["model"] != first[1]["model"]:
            inputs = made_from_of(path, manifest).inputs
            common = {name: inputs[name] for name in inputs.keys() & made_from.inputs}
            differing = sorted(made_from.differences(common))[:_SHOWN] or ["of another origin"]
            raise LogitsStoreError(
                f"{path} holds the logits of {manifest['cf_model']!r}, {first[0]} those of "
                f"{first[1]['cf_model']!r} ({'; '.join(differing)}): stores that are used together "
                f"must be of one CF model; write both with {TRAIN_CF}, or import both under one "
                "--name"
            )


def _difference(path: StorePath, sequences: ItemSequences, catalogue: Catalogue) -> str:
    """' (...)': in words what differs; empty if the store's ids are missing or damaged."""
    found = key_values(path).read(IDS).result()
    if found.state != "value":
        return ""
    try:
        with reading(within(path, IDS), ".npz file"), np.load(io.BytesIO(found.value)) as ids:
            there, here = ids["item_ids"].tolist(), list(catalogue.item_ids)
            user, items, offsets = ids["user"], ids["items"], ids["offsets"]
    except UserError:
        return ""
    if here != there:
        return f" ({_items_differ(there, here)})"
    common = min(len(user), len(sequences))
    for row in range(common):
        old, new = items[offsets[row] : offsets[row + 1]], sequences[row]
        if user[row] != sequences.user[row] or not np.array_equal(old, new):
            sides = (
                f"user {owner[row]} with {len(part)} items .. {[here[i] for i in part[-_SHOWN:]]}"
                for owner, part in ((user, old), (sequences.user, new))
            )
            return f" (row {row} is {' there, '.join(sides)} in the data)"
    if len(user) != len(sequences):
        return f" ({len(user)} rows there, {len(sequences)} in the data; the first {common} agree)"
    return " (the ids are the same: titles or timestamps differ)"


def _items_differ(there: list[str], here: list[str]) -> str:
    lost, added = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    if lost or added:
        return (
            f"{len(lost)} items only there, such as {lost[:_SHOWN]}; {len(added)} items only in "
            f"the data, such as {added[:_SHOWN]}"
        )
    at = next(at for at, item in enumerate(there) if item != here[at])
    return f"the same ids in another order: item {at} is {there[at]!r} there, {here[at]!r} here"
