"""Writes a CF logits store (logits_format.py says what that is).

Until the new manifest stands at its place, in one piece, the store before can be read. Nothing is
deleted but what this module wrote. Of writers at once into one place one is refused: on a disk the
last to begin, by its lease; in a bucket the others, when they are about to replace the manifest.

Axis letters: m events of a block, K kept logits.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from absl import logging

from tca4rec_jax.cf.logits_format import (
    DTYPES,
    FORMAT,
    IDS,
    KINDS,
    MANIFEST,
    ArrayChecks,
    LogitsStoreError,
    Origin,
    StorePath,
    block_rows,
    blocks,
    create_array,
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
from tca4rec_jax.fileio import check_room, fingerprint, remove
from tca4rec_jax.lease import only_writer

MANY_ITEMS = 100_000
"""Beyond them dense logits are cut to the TOP_K highest, unless cf.top_k says otherwise."""
TOP_K = 1000
_SAMPLED = 256  # events that the statistics are made of
_OURS = {"format", "rows_hash", "catalogue_hash"}  # a manifest with these fields is a store's
_FOLDER = re.compile("values_[0-9a-f]{8}")
_OF_FORMAT_1 = {IDS, *(name for names in KINDS.values() for name in names)}


def write_store(
    path: StorePath,
    sequences: ItemSequences,
    catalogue: Catalogue,
    origin: Origin,
    *,
    dtype: str = "float32",
    top_k: int | None = None,
    source: Path | None = None,
    **arrays: np.ndarray | LazyRows | None,
) -> None:
    """Writes the store of some rows and a catalogue, and replaces the one at `path`, if any.

    `arrays` are those of a kind of store (logits_format.py), whatever is sliced by rows (a memory
    map, scoring.LazyRows): they are copied block by block. `dtype` (of DTYPES) is that of vectors,
    logits and values; the rest is float32. `top_k` keeps the highest logits of an event and one
    floor for the others, see `highest`; None keeps all, or TOP_K dense ones of MANY_ITEMS.

    Raises UserError, before anything is written, if the disk lacks room; LogitsStoreError for a
    `path` with something else than a store, arrays that do not fit
    each other, the rows or the catalogue, and NaN or infinite values; it names `source`, the file
    of the arrays, instead of the store. Raises LeaseError if another process writes there.
    """
    path = store_path(path)
    named = source or path
    if dtype not in DTYPES:
        raise LogitsStoreError(f"{named}: dtype is {dtype!r}, expected one of {DTYPES}")
    given = {name: array for name, array in arrays.items() if array is not None}
    shapes = {name: list(array.shape) for name, array in given.items()}
    checks = ArrayChecks.of(named, shapes, sequences, catalogue.num_items)
    if top_k is None and "logits" in given and catalogue.num_items > MANY_ITEMS:
        top_k = TOP_K
        logging.info(
            "%s: of %d logits of an event the %d highest are kept, and one for the others; "
            "cf.top_k sets another number",
            *(path, catalogue.num_items, top_k),
        )
    shapes, parts = _contents(given, top_k, checks)
    if isinstance(path, Path):
        width = np.dtype(ts.dtype(dtype).numpy_dtype).itemsize
        num_bytes = sum(width * math.prod(shape) for shape in shapes.values())
        otherwise = "keep fewer with cf.top_k, or name another folder in cf.logits"
        check_room(path.parent, num_bytes, f"the CF logits of {path.name}", otherwise)
    manifest = {
        "format": FORMAT,
        "kind": kind_of(shapes),
        **origin.fields(),
        "entries_per": checks.events_per,
        **identity(sequences, catalogue),
        "arrays": shapes,
        "dtype": dtype,
    }
    with only_writer(path), _replaced(path, manifest) as folder:
        targets = {name: create_array(folder, name, manifest) for name in shapes}
        hashes = {name: hashlib.sha256() for name in shapes}
        for start, name, block in parts:
            with np.errstate(over="ignore"):
                block = block.astype(targets[name].dtype.numpy_dtype)
            checks.values(name, start, block)
            hashes[name].update(block.tobytes())
            targets[name][start : start + len(block)].write(block).result()
        digests = {name: hashes[name].hexdigest() for name in shapes}
        manifest["content_hash"] = fingerprint([dtype, shapes, digests])
        checks = ArrayChecks(folder, sequences, catalogue.num_items, checks.events_per)
        _write_ids(folder, sequences, catalogue)
        manifest["temperature"] = _statistics(LogitsStore.of(path, manifest, checks))


def made_by(path: StorePath) -> str | None:
    """The script that wrote the store at `path`, '' for one of before; None if nothing is there.

    Raises LogitsStoreError if something else is there.
    """
    manifest = _Place.of(store_path(path)).manifest
    return manifest.get("made_from", {"command": ""})["command"] if manifest else None


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


def _write_ids(folder: StorePath, sequences: ItemSequences, catalogue: Catalogue) -> None:
    ids = io.BytesIO()
    np.savez_compressed(
        ids,
        item_ids=np.array(catalogue.item_ids, dtype=np.str_),
        user=sequences.user,
        items=sequences.items,
        offsets=sequences.offsets,
    )
    key_values(folder).write(IDS, ids.getvalue()).result()


def _statistics(store: LogitsStore) -> dict:
    """Those of some of the written logits."""
    last = len(store.positions) - 1
    count = min(_SAMPLED, last + 1, block_rows((0, store.manifest["num_items"])))
    sample = store.positions[np.linspace(0, last, count).astype(np.int64)]
    return temperature_statistics(store.logits(sample))


class _Place(NamedTuple):
    """What is at the path of a store: its manifest ({} if there is none), and the names there."""

    path: StorePath
    text: bytes | None
    generation: bytes
    manifest: dict
    names: set[str]

    @classmethod
    def of(cls, path: StorePath) -> "_Place":
        """Raises LogitsStoreError if it is neither empty nor a store."""
        if isinstance(path, Path) and path.exists() and not path.is_dir():
            raise LogitsStoreError(f"{path} is a file; choose another place for the CF logits")
        files = key_values(path)
        found = files.read(MANIFEST).result()
        text = found.value if found.state == "value" else None
        names = {key.decode().partition("/")[0] for key in files.list().result()}
        try:
            manifest = json.loads(text or "{}")
        except ValueError:
            manifest = {}
        others = sorted(name for name in names if not _FOLDER.fullmatch(name))
        if others and not (isinstance(manifest, dict) and set(manifest) >= _OURS):
            raise LogitsStoreError(
                f"{path} holds something other than CF logits ({', '.join(others[:3])}) and "
                "is not replaced: choose another place, or empty it"
            )
        return cls(path, text, found.stamp.generation, manifest, names)

    def write_manifest(self, text: bytes | None, generation: bytes) -> bytes:
        """Replaces the manifest of that generation, or deletes it; returns the new generation.

        Raises LogitsStoreError if another process has replaced it.
        """
        written = key_values(self.path).write(MANIFEST, text, if_equal=generation).result()
        if not written.generation:
            raise LogitsStoreError(
                f"{self.path}: another process has begun to write this store: let it end, then "
                "start again if these are the logits that you want"
            )
        return written.generation

    def delete(self, name: str) -> None:
        """Deletes a file or a folder."""
        if isinstance(self.path, Path):
            return remove(self.path / name)
        for first, end in ((name, f"{name}\0"), (f"{name}/", f"{name}0")):  # "0" follows "/"
            key_values(self.path).delete_range(ts.KvStore.KeyRange(first, end)).result()


@contextlib.contextmanager
def _replaced(path: StorePath, manifest: dict) -> Iterator[StorePath]:
    """A new folder for the values of a store; after the block, the manifest at `path` names it.

    After an error what was at `path` is there as before.
    """
    place, name = _Place.of(path), f"values_{uuid.uuid4().hex[:8]}"
    # Now no writer that began before can replace the manifest: what it has written is deleted.
    begun = _json((place.manifest or manifest) | {"writing": name})
    generation = place.write_manifest(begun, place.generation)
    old = place.manifest.get("folder")
    try:
        for other in place.names - {old}:
            if _FOLDER.fullmatch(other):
                place.delete(other)
        yield within(path, name)
        place.write_manifest(_json(manifest | {"folder": name}), generation)
    except BaseException:
        if _Place.of(path).manifest.get("folder") == name:  # the error came after the last write
            raise
        place.delete(name)
        place.write_manifest(place.text, generation)  # or it says that another writer has begun
        if isinstance(path, Path) and not place.names:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    of_format_1 = place.names & _OF_FORMAT_1 if place.manifest.get("format") == 1 else set()
    for other in {old} & place.names if old else of_format_1:
        place.delete(other)


def _json(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()
