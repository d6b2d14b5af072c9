"""The prepared data of a run: read from its source once, kept as TFDS files, and its summary."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from absl import logging

from tca4rec_jax.data import downloads, tfds_rec
from tca4rec_jax.data.interactions import (
    build_splits,
    read_interactions,
    read_items,
    treat_duplicates,
)
from tca4rec_jax.data.movielens import INTERACTIONS_FILE, ITEMS_FILE, read_movielens
from tca4rec_jax.data.published import published_files, read_published
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.data.tables import Reading
from tca4rec_jax.data.tfds_rec import read as load
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path, file_sha256
from tca4rec_jax.ranges import (
    Count,
    Encoding,
    Fractions,
    LocalPath,
    Natural,
    Seed,
    Text,
    check_fields,
)

_FORMAT = 1  # part of the fingerprint: raise it when the rows made from the same input change


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to make rows of it.

    Attributes:
      source: 'movielens_100k' (downloaded, or the files in the folder `path`), 'files' (the
        tables `interactions` and `items`) or 'published' (the layout of the published data sets
        in the folder `path`).
      path: a folder, see source.
      interactions: CSV, TSV, JSON-lines or Parquet file with a user, an item and a timestamp per
        row.
      catalogue: CSV, TSV, JSON-lines or Parquet file with an item and a title per row.
      user_column, item_column, timestamp_column, title_column: names of the columns in those two
        files (the item's column has one name in both).
      history_length: the most items before a target.
      min_history: the fewest; by default history_length.
      split: fractions of the rows in train, validation and test, in time order.
      seed: of the order of interactions that share a timestamp.
      max_title_length: titles are cut to so many characters; 0 keeps them whole.
      encoding: of the text files of 'files'.
      drop_invalid: leave out rows of 'files' that cannot be used, and log how many and why.
      drop_duplicates: keep one of the interactions of a user, an item and a time.

    history_length, min_history, split, seed and drop_duplicates have no effect on 'published',
    whose rows are made.
    """

    source: Literal["movielens_100k", "files", "published"] = "movielens_100k"
    path: LocalPath | None = None
    interactions: LocalPath | None = None
    catalogue: LocalPath | None = None
    user_column: Text = "user"
    item_column: Text = "item"
    timestamp_column: Text = "timestamp"
    title_column: Text = "title"
    history_length: Count = 10
    min_history: Count | None = None
    split: Fractions = (0.8, 0.1, 0.1)
    seed: Seed = 0
    max_title_length: Natural = 100
    encoding: Encoding = "utf-8"
    drop_invalid: bool = False
    drop_duplicates: bool = False

    def __post_init__(self):
        check_fields(self, "data.")
        if self.min_history and self.min_history > self.history_length:
            raise UserError(
                f"data.min_history is {self.min_history}: expected at most data.history_length, "
                f"{self.history_length}"
            )
        object.__setattr__(self, "split", tuple(float(part) for part in self.split))

    def inputs(self) -> dict[str, Path]:
        """The user's folder or files by field, {} if there are none; UserError if one is needed."""
        roles = ("interactions", "catalogue") if self.source == "files" else ("path",)
        given = {role: Path(value) for role in roles if (value := getattr(self, role))}
        if len(given) < len(roles) and self.source != "movielens_100k":
            needed = " and ".join(f"data.{role}" for role in roles)
            raise UserError(f"data.source={self.source} needs {needed}")
        return given


def prepare(data_config: Mapping, data_dir: str | os.PathLike) -> RecData:
    """Reads the source, makes the splits and writes them to data_dir; or reuses what is there.

    data_dir is reused if it was made with the same settings from the same input files (compared by
    their SHA-256). It is written atomically.

    Raises TypeError for a key that is no field of DataConfig, FileNotFoundError for a missing file,
    UserError for bad settings or input, a failed download, or a data_dir with something else: data
    made otherwise (the message says what differs) or other files. Nothing is overwritten.
    """
    config, data_dir = DataConfig(**data_config), Path(data_dir)
    files = _source_files(config)
    settings = _settings(config, files)
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        _check_same(data_dir, settings)
        logging.info("Reusing the prepared data in %s", data_dir)
        return load(data_dir)
    data = _read_source(config, files)
    with atomic_path(data_dir) as temporary:
        temporary.mkdir()
        tfds_rec.write(data, temporary, settings)
    return data


def _source_files(config: DataConfig) -> dict[str, Path]:
    files = config.inputs()
    if config.source == "published":
        return published_files(files["path"])
    if config.source == "movielens_100k":
        folder = files.get("path") or downloads.fetch("movielens-100k")
        files = {"catalogue": folder / ITEMS_FILE, "interactions": folder / INTERACTIONS_FILE}
    for role, path in sorted(files.items()):
        if not path.is_file():
            raise FileNotFoundError(f"data.{role}: {path} does not exist")
    return files


def _read_source(config: DataConfig, files: dict[str, Path]) -> RecData:
    if config.source == "published":
        return read_published(files["items"].parent, config.max_title_length)
    if config.source == "movielens_100k":
        catalogue, interactions = read_movielens(files["catalogue"].parent, config.max_title_length)
    else:
        columns = {"item": config.item_column, "title": config.title_column}
        reading = Reading(config.encoding, config.drop_invalid)
        catalogue = read_items(files["catalogue"], columns, config.max_title_length, reading)
        columns = {"user": config.user_column, "item": config.item_column}
        columns["timestamp"] = config.timestamp_column
        interactions = read_interactions(files["interactions"], catalogue, columns, reading)
    interactions = treat_duplicates(interactions, config.drop_duplicates)
    settings = ("history_length", "min_history", "split", "seed")
    splits = build_splits(interactions, **{name: getattr(config, name) for name in settings})
    return RecData(catalogue, splits, interactions.user_ids)


def _settings(config: DataConfig, files: dict[str, Path]) -> dict:
    """What the rows depend on: the config without the files' paths, and the files' SHA-256."""
    settings = asdict(config) | {"format": _FORMAT}
    for name in ("path", "interactions", "catalogue"):
        del settings[name]
    settings |= {f"SHA-256 of {role}": file_sha256(path) for role, path in files.items()}
    return json.loads(json.dumps(settings))  # tuples become lists, as in the stored metadata


def _check_same(data_dir: Path, settings: dict) -> None:
    try:
        defaults = json.loads(json.dumps(asdict(DataConfig())))  # of fields that came later
        stored = defaults | tfds_rec.read_metadata(data_dir)["settings"]
    except FileNotFoundError as error:
        message = f"{data_dir} is not empty and holds no prepared data; choose another folder"
        raise UserError(message) from error
    pairs = {name: (stored.get(name), settings.get(name)) for name in sorted({*stored, *settings})}
    differing = [f"{name}: {a!r} there, {b!r} now" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise UserError(
            f"{data_dir} was prepared otherwise ({'; '.join(differing)}). Models and logits in "
            "the same workdir belong to it: choose another workdir, or delete the folder"
        )


def summarise(data: RecData) -> dict:
    """{'items', 'distinct_titles', 'splits': {name: counts}}, JSON-able.

    Of a split's rows, tied is the share whose target shares its time with the item before it (None
    if the data have no two times in a row),
    repeated that whose target is among the items before it, seen_users that whose user has rows in
    train_sequences.
    """
    trained = data.splits["train_sequences"].user
    return {
        "items": data.catalogue.num_items,
        "distinct_titles": len(set(data.catalogue.titles)),
        "splits": {name: _counts(data.splits[name], trained) for name in SPLITS},
    }


def _counts(sequences: ItemSequences, trained: np.ndarray) -> dict[str, int | float | None]:
    target_of_item = np.repeat(sequences.items[sequences.last_positions], sequences.lengths)
    is_target = (sequences.items == target_of_item).astype(np.int64)
    repeated = np.add.reduceat(is_target, sequences.offsets[:-1]) > 1  # once as the target itself
    return {
        "rows": len(sequences),
        "users": len(np.unique(sequences.user)),
        "interactions": len(sequences.items),
        "mean_length": float(sequences.lengths.mean()),
        "tied": float(sequences.tied.mean()) if sequences.has_times else None,
        "repeated": float(repeated.mean()),
        "seen_users": float(np.isin(sequences.user, trained).mean()),
    }
