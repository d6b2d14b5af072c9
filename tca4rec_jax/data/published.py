"""The published preprocessed form of the Amazon data sets (the folder of one data set).

item.csv has one line per item (rawid, title, iid = 1..N); train*.csv, valid*.csv and test*.csv
have one line per row: the user `uid`, the target `iid`, its `timestamp` and `hist_id`, the list of
the iids before it, oldest first. Item index = iid - 1. Only the targets have a time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import catalogue_of
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import UNKNOWN_TIME, ItemSequences, RecData
from tca4rec_jax.data.tables import read_table
from tca4rec_jax.errors import UserError

ITEMS_FILE = "item.csv"
SPLIT_FILES = {"train": "train*.csv", "validation": "valid*.csv", "test": "test*.csv"}
_LIST = r"\[\s*\d{1,9}(?:\s*,\s*\d{1,9})*\s*\]"
_MOST = 2**31 - 1  # users are int32


def published_files(folder: Path) -> dict[str, Path]:
    """The files of the folder: 'items', 'train', 'validation', 'test' -> path.

    Raises FileNotFoundError or UserError unless each of them is there exactly once.
    """
    files = {"items": folder / ITEMS_FILE}
    if not files["items"].is_file():
        raise FileNotFoundError(f"{files['items']} does not exist (expected the published layout)")
    for split, pattern in SPLIT_FILES.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if len(found) != 1:
            raise UserError(f"{folder} must hold exactly one file {pattern}, it holds {found}")
        files[split] = folder / found[0]
    return files


def read_published(
    folder: Path | str,
    max_title_length: int = 0,
    attributes: Sequence[str] = (),
    *,
    keep_spaces: bool = False,
) -> RecData:
    """The catalogue and the splits; train_sequences holds the rows of train as they are.

    `attributes` are other columns of item.csv. White space in titles is made single spaces, unless
    it is kept.

    Raises FileNotFoundError or UserError, naming file and row, for files of another form.
    """
    files = published_files(Path(folder))
    catalogue = _read_catalogue(files["items"], max_title_length, attributes, keep_spaces)
    splits = {name: _read_rows(files[name], catalogue) for name in SPLIT_FILES}
    return RecData(catalogue, {"train_sequences": splits["train"], **splits})


def _read_catalogue(
    path: Path, max_title_length: int, attributes: Sequence[str], keep_spaces: bool
) -> Catalogue:
    table = read_table(path, {name: name for name in ("iid", "rawid", "title", *attributes)})
    iid = table.integers("iid", least=1)
    order = np.argsort(iid, kind="stable")
    wrong = np.flatnonzero(iid[order] != np.arange(1, len(iid) + 1))
    if wrong.size:
        raise UserError(
            f"{path}: the iids must be 1..{len(iid)}, each once, but {iid[order[wrong[0]]]} stands "
            f"where {wrong[0] + 1} was expected (a duplicated or a missing iid)"
        )
    ids, titles = table.ids("rawid")[order], table.titles("title")[order]
    if keep_spaces:
        titles = table.texts("title").to_numpy(object)[order]
    texts = {
        name: tuple(map(texts.__getitem__, order))
        for name, texts in table.attributes(attributes).items()
    }
    return catalogue_of(path, ids, titles, max_title_length, texts, keep_spaces=keep_spaces)


def _read_rows(path: Path, catalogue: Catalogue) -> ItemSequences:
    table = read_table(path, {name: name for name in ("uid", "iid", "hist_id", "timestamp")})
    target = table.integers("iid")
    text = table.texts("hist_id")
    bad = ~text.str.fullmatch(_LIST).to_numpy(bool)
    table.refuse("hist_id", bad, "a list of item numbers such as [12, 7]")
    lengths = text.str.count(",").to_numpy(np.int64) + 1
    numbers = np.array(",".join(text.str.strip("[] ")).split(","), dtype=object).astype(np.int64)
    history = Ragged.from_lengths(numbers, lengths)
    rows = history.followed_by(Ragged(target, np.arange(len(target) + 1)))
    last = rows.offsets[1:] - 1
    outside = (rows.values < 1) | (rows.values > catalogue.num_items)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"{path}, row {rows.row_of(at) + 1}: {'iid' if at in last else 'hist_id'} has item "
            f"{rows.values[at]}, but {ITEMS_FILE} has the iids 1..{catalogue.num_items}"
        )
    timestamps = np.full(rows.values.size, UNKNOWN_TIME, np.int64)
    timestamps[last] = table.times("timestamp")
    return ItemSequences(
        table.integers("uid", most=_MOST), rows.values - 1, rows.offsets, timestamps
    )
