"""The prepared data of a run: read from its source once, kept as TFDS files, and its summary."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from absl import logging

from tca4rec_jax.data import downloads, tfds_rec
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import (
    Interactions,
    read_interactions,
    read_items,
    read_items_without_titles,
    treat_duplicates,
)
from tca4rec_jax.data.movielens import INTERACTIONS_FILE, ITEMS_FILE, read_movielens
from tca4rec_jax.data.published import published_files, read_published
from tca4rec_jax.data.raw import FORMATS, read_raw
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.data.splits import build_splits
from tca4rec_jax.data.tables import Reading
from tca4rec_jax.data.templates import ITEM_FIELDS
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path, file_sha256
from tca4rec_jax.lease import only_writer
from tca4rec_jax.provenance import Provenance, StaleError, flatten
from tca4rec_jax.ranges import (
    Count,
    Encoding,
    Fractions,
    LocalPath,
    Natural,
    NotNegative,
    Seed,
    Text,
    check_fields,
)

_FORMAT = 1  # part of the provenance: raise it when the rows made from the same input change
_COMMAND = "launch/prepare_data.py in another work directory, or after deleting the folder"
_PLACES = ("path", "interactions", "catalogue")
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # by source: needed, optional
    "movielens_100k": ((), ("path",)),
    "files": (("interactions", "catalogue"), ()),
    "sequences": (("interactions",), ("catalogue",)),
    "published": (("path",), ()),
    **dict.fromkeys(FORMATS, (("interactions", "catalogue"), ())),
    "lastfm": (("interactions",), ("catalogue",)),
}
Source = Literal[
    "movielens_100k",
    "files",
    "sequences",
    "published",
    "amazon_2014",
    "amazon_2018",
    "amazon_2023",
    "movielens",
    "steam",
    "lastfm",
    "yelp",
    "goodreads",
]


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to make rows of it.

    Attributes:
      source: 'movielens_100k' (downloaded, or the files in the folder `path`), 'files' (the
        tables `interactions` and `catalogue`), 'sequences' (the same without times: the
        interactions of a user stand in their order; often JSON), 'published' (the layout of the
        published data sets in the folder `path`), or the name of a format in data/raw/formats.py
        (the two files of it that people download, as they come).
      path: a folder, see source.
      interactions: CSV, TSV, JSON-lines or Parquet file with a user, an item and a timestamp per
        row; of 'sequences' also JSON, {user: [item, ..]}, oldest first.
      catalogue: CSV, TSV, JSON-lines or Parquet file with an item and a title per row, or JSON,
        {item: title}; without one an item's title is its id ('sequences' only).
      user_column, item_column, timestamp_column, title_column: names of the columns in those two
        files (the item's column has one name in both).
      rating_column: the column of ratings in the interactions, for recommenders that answer Yes or
        No; of MovieLens and the formats 'rating'. By default none is read.
      liked_above: a rating above this is liked.
      attributes: columns of the catalogue with other texts of an item, which prompts may show:
        {brand} in prompt.item; of MovieLens year and category, of a format those that it has.
      split_by: 'time' (chronological over all users together) or 'leave_one_out' (of every user
        the last item is the target of test, the last but one that of validation).
      history_length: the most items before a target.
      min_history: the fewest; by default history_length, of 'leave_one_out' 1.
      split: fractions of the rows in train, validation and test, in time order ('time').
      seed: of the order of interactions that share a timestamp.
      max_title_length: titles are cut to so many characters; 0 keeps them whole.
      title_spaces: runs of white space in a title are made 'single' spaces, and it has none at its
        ends; 'kept' leaves those of 'published' as they are in the file.
      encoding: of text files, but JSON, which is UTF-8.
      drop_invalid: leave out rows of these that cannot be used, and log how many and why.
      drop_duplicates: keep one of the interactions of a user, an item and a time.

    history_length, min_history, split, seed and drop_duplicates have no effect on 'published',
    whose rows are made; seed and drop_duplicates none on 'sequences'.
    """

    source: Source = "movielens_100k"
    path: LocalPath | None = None
    interactions: LocalPath | None = None
    catalogue: LocalPath | None = None
    user_column: Text = "user"
    item_column: Text = "item"
    timestamp_column: Text = "timestamp"
    title_column: Text = "title"
    rating_column: Text | None = None
    liked_above: NotNegative = 3.0
    attributes: tuple[Text, ...] = ()
    split_by: Literal["time", "leave_one_out"] = "time"
    history_length: Count = 10
    min_history: Count | None = None
    split: Fractions = (0.8, 0.1, 0.1)
    seed: Seed = 0
    max_title_length: Natural = 100
    title_spaces: Literal["single", "kept"] = "single"
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
        for name in self.attributes:
            if name in ("item", *ITEM_FIELDS) or {*name} & {*"{}:!"}:
                raise UserError(
                    f"data.attributes has {name!r}: expected names of columns, without braces, "
                    f"colons and exclamation marks, none of item, {', '.join(ITEM_FIELDS)}"
                )
        if self.attributes and self.source == "sequences" and not self.catalogue:
            raise UserError("data.attributes needs data.catalogue")
        if self.rating_column and self.source == "published":
            raise UserError("data.rating_column is set, but data.source=published has no ratings")
        if self.title_spaces == "kept" and self.source != "published":
            raise UserError("data.title_spaces is 'kept': that is for data.source=published only")
        fixed = {"sequences": "leave_one_out", "published": "time"}
        if self.split_by != fixed.get(self.source, self.split_by):
            why = "no times" if self.source == "sequences" else "splits of their own"
            raise UserError(
                f"data.split_by is {self.split_by!r}: data.source={self.source} has {why}, "
                f"expected {fixed[self.source]!r}"
            )
        object.__setattr__(self, "split", tuple(float(part) for part in self.split))

    @property
    def rating(self) -> dict[str, str]:
        """The column of ratings by its name here; none if they are not read."""
        return {"rating": self.rating_column} if self.rating_column else {}

    def inputs(self) -> dict[str, Path]:
        """The user's folder or files by field, {} if there are none; UserError if one is needed."""
        needed, optional = _ROLES[self.source]
        given = {role: Path(value) for role in needed + optional if (value := getattr(self, role))}
        if not given.keys() >= set(needed):
            fields = " and ".join(f"data.{role}" for role in needed)
            raise UserError(f"data.source={self.source} needs {fields}")
        return given


def prepare(data_config: Mapping, data_dir: str | os.PathLike) -> RecData:
    """Reads the source, makes the splits and writes them to data_dir; or reuses what is there.

    data_dir is reused if it was made with the same settings from the same input files (compared by
    their SHA-256). It is written atomically.

    Raises TypeError for a key that is no field of DataConfig, FileNotFoundError for a missing file,
    UserError for bad settings or input, a failed download, or a data_dir with something else: data
    made otherwise (the message says what differs) or other files, or that another process writes.
    Nothing is overwritten.
    """
    config, data_dir = DataConfig(**data_config), Path(data_dir)
    files = _source_files(config)
    logging.info("Reading %s", ", ".join(map(str, files.values())))
    contents: dict[str, str | None] = {
        f"SHA-256 of {role}": file_sha256(path) for role, path in files.items()
    }
    if config.source == "sequences":
        contents.setdefault("SHA-256 of catalogue", None)  # made without titles
    made_from = Provenance("data set", _COMMAND, _fields(config) | contents)
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        try:
            data = _read(data_dir, made_from.inputs)
        except FileNotFoundError as error:
            message = f"{data_dir} is not empty and holds no prepared data; choose another folder"
            raise UserError(message) from error
        logging.info("Reusing the prepared data in %s", data_dir)
        return data
    data = _read_source(config, files)
    with only_writer(data_dir), atomic_path(data_dir) as temporary:
        temporary.mkdir()
        tfds_rec.write(data, temporary)
        made_from.save(temporary)
    return data


def load(data_dir: str | os.PathLike, data_config: Mapping | None = None) -> RecData:
    """The data that `prepare` wrote; a split is read when it is first asked for.

    Raises FileNotFoundError if there are none, StaleError if they were prepared otherwise than
    `data_config` (config.data) now says, wherever the source lies; UserError if they, or a split,
    are damaged.
    """
    now = {} if data_config is None else _fields(DataConfig(**data_config))
    return _read(Path(data_dir), now)


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
        return read_published(
            files["items"].parent,
            config.max_title_length,
            config.attributes,
            keep_spaces=config.title_spaces == "kept",
        )
    if config.source == "movielens_100k":
        catalogue, interactions = read_movielens(
            files["catalogue"].parent,
            config.max_title_length,
            config.attributes,
            config.rating,
        )
    elif config.source in FORMATS:
        catalogue, interactions = read_raw(
            config.source,
            files,
            attributes=config.attributes,
            ratings=bool(config.rating),
            reading=Reading(config.encoding, config.drop_invalid),
            max_title_length=config.max_title_length,
        )
    else:
        catalogue, interactions = _read_tables(config, files)
    interactions = treat_duplicates(interactions, config.drop_duplicates)
    settings = ("split_by", "history_length", "min_history", "split", "seed", "liked_above")
    splits = build_splits(interactions, **{name: getattr(config, name) for name in settings})
    return RecData(catalogue, splits, interactions.user_ids)


def _read_tables(config: DataConfig, files: Mapping[str, Path]) -> tuple[Catalogue, Interactions]:
    reading = Reading(config.encoding, config.drop_invalid)
    columns = {"user": config.user_column, "item": config.item_column}
    if "catalogue" in files:
        titles = {"item": config.item_column, "title": config.title_column}
        titles |= {name: name for name in config.attributes}
        catalogue = read_items(files["catalogue"], titles, config.max_title_length, reading)
    else:
        catalogue = read_items_without_titles(files["interactions"], columns, reading)
    if config.source == "files":
        columns["timestamp"] = config.timestamp_column
    columns |= config.rating
    return catalogue, read_interactions(files["interactions"], catalogue, columns, reading)


def _fields(config: DataConfig) -> dict:
    """The fields of the config that the rows depend on: all but where the source lies."""
    fields = {name: value for name, value in asdict(config).items() if name not in _PLACES}
    return {"data": fields, "format": _FORMAT}


def _read(data_dir: Path, now: Mapping) -> RecData:
    """The prepared data, if they were made from the inputs of `now`."""
    data = tfds_rec.read(data_dir)
    try:
        made_from = Provenance.load(data_dir)
    except StaleError as error:
        raise StaleError(f"{error}: make it anew with {_COMMAND}") from error
    defaults = dict(flatten(_fields(DataConfig())))  # of fields that came later
    replace(made_from, inputs=defaults | dict(made_from.inputs)).check(now, data_dir)
    return data


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
