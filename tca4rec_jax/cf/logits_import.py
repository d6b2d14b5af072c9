"""Anyone's CF logits into a store: NumPy arrays, or tables of (row, item, score).

Axis letters: E events, I items, K most scores of an event.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tca4rec_jax.cf.logits_format import LogitsStoreError, StorePath
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.tables import read_table

KEYS = ("row", "position", "user")
_SHOWN = 5  # ids in a message


def import_logits(
    source: Path | str,
    path: StorePath,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    floor: float | None = None,
    user_ids: Sequence[str] | None = (),
    **options,
) -> None:
    """Writes a store from a user's own file.

    A .npy file has logits [rows or flat positions, items]; an .npz file has one such array, or
    arrays named `vectors`, `item_table` and perhaps `item_bias`. The item axis is the catalogue in
    its order, without a row for padding. Files are memory-mapped (an .npz file if it is not
    compressed).

    A table (.csv, .tsv, .parquet) has the columns `item`, `score` and one of KEYS, and becomes a
    topk store. `item` is an item id of the catalogue. `row` counts the rows of the split from 0 and
    scores the last event of each; `position` is a flat position (every event of every row); `user`
    is a user id of the data and gives the same logits to every event of the user's rows, whether or
    not they come from the user's future.

    Args:
      source: the file.
      path: the store to write.
      sequences, catalogue: what the logits are for.
      floor: the logit of the items that an event of a table has no score for; None: its lowest
        score.
      user_ids: as RecData.user_ids, for a table with the column `user`.
      options: as for `write_store` (cf_model, history_length, dtype, top_k).

    Raises:
      LogitsStoreError, ValueError: no such file, not arrays of numbers or a table, a number of rows
        or columns that does not fit (the message gives both numbers), NaN or infinite values, an
        unknown item or row, an item twice in an event, rows without any score; the message names
        the file and the row or the ids.
    """
    source = Path(source)
    if source.suffix in (".npy", ".npz"):
        if floor is not None:
            raise LogitsStoreError(f"{source}: a floor goes with a table of scores, not an array")
        arrays = _read_arrays(source)
    else:
        arrays = _topk_arrays(source, sequences, catalogue, floor, user_ids)
    options = {"cf_model": "imported", **options}
    write_store(path, sequences, catalogue, source=source, **arrays, **options)


def _topk_arrays(
    source: Path,
    sequences: ItemSequences,
    catalogue: Catalogue,
    floor: float | None,
    user_ids: Sequence[str] | None,
) -> dict[str, Any]:
    """The arrays of a topk store from a table."""
    key, number, item, score = _read_table(source, catalogue, user_ids)
    num_events = {
        "row": len(sequences),
        "position": len(sequences.items),
        "user": max(int(sequences.user.max()) + 1, len(user_ids or ())),
    }[key]
    outside = np.unique(number[number >= num_events])
    if outside.size:
        raise LogitsStoreError(
            f"{source}: {len(outside)} {key}s are not in the data, such as "
            f"{outside[:_SHOWN].tolist()}; expected 0..{num_events - 1}"
        )
    order = np.lexsort((item, number))
    number, item, score = number[order], item[order], score[order]
    twice = (np.diff(number) == 0) & (np.diff(item) == 0)
    if twice.any():
        at = int(np.argmax(twice))
        raise LogitsStoreError(
            f"{source}: {key} {number[at]} has two scores for item {catalogue.item_ids[item[at]]!r}"
        )
    counts_E = np.bincount(number, minlength=num_events)
    needed = np.unique(sequences.user) if key == "user" else np.arange(num_events)
    missing = needed[counts_E[needed] == 0]
    if missing.size:
        raise LogitsStoreError(
            f"{source}: {len(missing)} of {len(needed)} {key}s have no score, such as "
            f"{missing[:_SHOWN].tolist()}; give each at least one"
        )
    arrays = _padded(number, item, score, counts_E, floor)
    if key == "user":
        user_E = np.repeat(sequences.user, sequences.lengths)
        arrays = {name: array[user_E] for name, array in arrays.items()}
    return arrays


def _read_arrays(source: Path) -> dict[str, Any]:
    """The arrays of a file by the names that `write_store` knows."""
    try:
        if source.suffix == ".npy":
            arrays: dict[str, Any] = {"logits": np.lib.format.open_memmap(source, mode="r")}
        else:
            with zipfile.ZipFile(source) as archive:
                arrays = {
                    member.filename.removesuffix(".npy"): _map_member(source, archive, member)
                    for member in archive.infolist()
                }
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise LogitsStoreError(
            f"{source} cannot be read as a {source.suffix} array of CF logits ({error}); "
            "save it with numpy.save"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise LogitsStoreError(
                f"{source}: {name} is of {array.dtype}, expected floating point numbers"
            )
    return {"logits": next(iter(arrays.values()))} if len(arrays) == 1 else arrays


def _map_member(source: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz file: mapped where it is not compressed, read where it is."""
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(file)
        header = file.tell()
    with source.open("rb") as raw:
        raw.seek(member.header_offset + 26)  # the local header repeats the name, then extra bytes
        name_length, extra_length = np.frombuffer(raw.read(4), "<u2")
    offset = member.header_offset + 30 + int(name_length) + int(extra_length) + header
    return np.memmap(source, dtype, "r", offset, shape, "F" if fortran else "C")


def _read_table(source: Path, catalogue: Catalogue, user_ids: Sequence[str] | None):
    """(name of the key column, its numbers, item indices, scores)."""
    columns = {"item": "item", "score": "score"}
    for key in KEYS:
        try:
            table = read_table(source, {key: key, **columns})
            break
        except ValueError as error:
            if f"has no column ['{key}']" not in str(error):
                raise
    else:
        raise LogitsStoreError(f"{source} needs one of the columns {KEYS} besides item and score")
    item = table.indices("item", catalogue.find, f"the catalogue of {catalogue.num_items}")
    score = pd.to_numeric(table["score"], errors="coerce")
    finite = np.isfinite(score.to_numpy(np.float64))
    table.refuse("score", ~finite, "a finite number")
    if key != "user" or user_ids == ():
        number = table.integers(key)
    elif user_ids is None:
        raise LogitsStoreError(
            f"{source}: the data do not say which user has which id, as they were prepared by an "
            "earlier version: prepare them again in another folder"
        )
    else:
        number = table.indices("user", pd.Index(user_ids).get_indexer, "the data")
    return key, number, item, score.to_numpy(np.float32)


def _padded(number, item, score, counts_E, floor: float | None) -> dict[str, np.ndarray]:
    """'values' float32 [E, K], 'items' int32 [E, K] (-1 fills up), 'floor' float32 [E]."""
    width = max(int(counts_E.max()), 1)
    values_ExK = np.zeros((len(counts_E), width), np.float32)
    items_ExK = np.full((len(counts_E), width), -1, np.int32)
    column = np.arange(len(number)) - np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    values_ExK[number, column], items_ExK[number, column] = score, item
    if floor is None:
        lowest_E = np.where(items_ExK >= 0, values_ExK, np.inf).min(axis=1)
        floor_E = np.where(counts_E > 0, lowest_E, 0.0).astype(np.float32)
    else:
        floor_E = np.full(len(counts_E), floor, np.float32)
    return {"values": values_ExK, "items": items_ExK, "floor": floor_E}
