"""Anyone's CF logits into a store: NumPy arrays, or tables of (row, item, score).

Axis letters: E events, K most scores of an event.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tca4rec_jax.cf.logits_format import IMPORT, LogitsStoreError, Origin, StorePath
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.table_files import MissingColumns
from tca4rec_jax.data.tables import Table, read_table
from tca4rec_jax.errors import reading
from tca4rec_jax.fileio import file_sha256

KEYS = ("row", "position", "user")


def import_logits(
    source: Path | str,
    path: StorePath,
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    name: str = "imported",
    floor: float | None = None,
    user_ids: Sequence[str] | None = (),
    **options,
) -> None:
    """Writes a store from a user's own file.

    A .npy file has logits [rows or flat positions, items]; an .npz file has one such array, or
    arrays named `vectors`, `item_table` and perhaps `item_bias`. The item axis is the catalogue in
    its order, without a row for padding. Files are memory-mapped (an .npz file if it is not
    compressed).

    A table (.csv, .tsv, .jsonl, .parquet) has the columns `item`, `score` and one of KEYS, and
    becomes a topk store. `item` is an item id of the catalogue. `row` counts the rows of the split
    from 0 and scores the last event of each; `position` is a flat position (every event of every
    row); `user` is a user id of the data and gives the same logits to every event of the user's
    rows, whether or not they come from the user's future.

    `name` is the CF model's: stores of one name go together. `floor` is the logit of the items that
    an event of a table has no score for, by default its lowest score, and above none; `user_ids`
    are those of RecData, for a table of users; `options` are those of write_store (dtype, top_k).

    Raises LogitsStoreError or ValueError, naming the file and the row or the ids: no such file, not
    arrays of numbers or a table, a number of rows or columns that does not fit (the message gives
    both numbers), NaN or infinite values, an unknown item or row, an item twice in an event, rows
    without any score.
    """
    source = Path(source)
    if source.suffix in (".npy", ".npz"):
        if floor is not None:
            raise LogitsStoreError(f"{source}: a floor goes with a table of scores, not an array")
        arrays = _read_arrays(source)
    else:
        arrays = _topk_arrays(source, sequences, catalogue, floor, user_ids)
    inputs = {"file": file_sha256(source), "floor": floor, **options}
    origin = Origin(name, model=f"imported: {name}", made_by=IMPORT, inputs=inputs)
    write_store(path, sequences, catalogue, origin, source=source, **arrays, **options)


def _topk_arrays(
    source: Path,
    sequences: ItemSequences,
    catalogue: Catalogue,
    floor: float | None,
    user_ids: Sequence[str] | None,
) -> dict[str, Any]:
    """The arrays of a topk store from a table: values and items [E, K], floor [E]."""
    key, table = _read_table(source)
    item = table.indices("item", catalogue.find, f"the catalogue of {catalogue.num_items}")
    score = table.numbers("score")
    if floor is not None:
        table.refuse(
            "score",
            ~(score >= floor),
            f"at least the floor {floor}, or items without a score would rank above",
        )
    if key != "user" or user_ids == ():
        number = table.integers(key)
    elif user_ids is None:
        raise LogitsStoreError(
            f"{source}: the data do not say which user has which id, as they were prepared by an "
            "earlier version: prepare them again in another folder"
        )
    else:
        number = table.indices("user", pd.Index(user_ids).get_indexer, "the data")
    num_events = {
        "row": len(sequences),
        "position": len(sequences.items),
        "user": max(int(sequences.user.max()) + 1, len(user_ids or ())),
    }[key]
    table.refuse(key, number >= num_events, f"0..{num_events - 1}")
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
            f"{missing[:5].tolist()}; give each at least one"
        )
    events = np.repeat(sequences.user, sequences.lengths) if key == "user" else needed
    width = int(counts_E.max())
    scores, items = (Ragged.from_lengths(values, counts_E) for values in (score, item))
    lowest_E = scores.pad(events, width, np.inf).min(axis=1)
    return {
        "values": scores.pad(events, width, 0),
        "items": items.pad(events, width, -1),
        "floor": lowest_E if floor is None else np.full(len(events), floor, np.float32),
    }


def _read_arrays(source: Path) -> dict[str, Any]:
    """The arrays of a file by the names that `write_store` knows."""
    with reading(source, f"{source.suffix} array of CF logits", remedy="save it with numpy.save"):
        if source.suffix == ".npy":
            arrays: dict[str, Any] = {"logits": np.lib.format.open_memmap(source, mode="r")}
        else:
            with zipfile.ZipFile(source) as archive:
                arrays = {
                    member.filename.removesuffix(".npy"): _map_member(source, archive, member)
                    for member in archive.infolist()
                }
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise LogitsStoreError(f"{source}: {name} is of {array.dtype}, expected floating point")
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


def _read_table(source: Path) -> tuple[str, Table]:
    """A table of scores, and which of KEYS it has."""
    for key in KEYS:
        try:
            return key, read_table(source, {name: name for name in (key, "item", "score")})
        except MissingColumns as error:
            if error.missing != [key]:
                raise
    raise LogitsStoreError(f"{source} needs one of the columns {KEYS} besides item and score")
