"""The prepared data of a run: read from its source once, kept as TFDS files, and its summary."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from absl import logging

from tca4rec_jax.data import beam_rows, downloads, tfds_rec
from tca4rec_jax.data.beam_sort import Workers
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.filters import Report, filtered, only_used
from tca4rec_jax.data.interactions import (
    Interactions,
    read_interactions,
    read_items,
    read_items_without_titles,
    treat_duplicates,
)
from tca4rec_jax.data.movielens import INTERACTIONS_FILE, ITEMS_FILE, read_movielens
from tca4rec_jax.data.ordering import sort_by_user
from tca4rec_jax.data.published import published_files, read_published
from tca4rec_jax.data.raw import FORMATS, ItemTexts, read_raw
from tca4rec_jax.data.sequences import RecData, check_has_rows
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.splits import build_splits, hold_out, sampled
from tca4rec_jax.data.summary import summarise
from tca4rec_jax.data.tables import Reading
from tca4rec_jax.data.windows import MadeData, Splits
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path, file_sha256, read_json, remove, write_text
from tca4rec_jax.lease import only_writer
from tca4rec_jax.provenance import Provenance, StaleError, flatten

_FORMAT = 1  # part of the provenance: raise it when the rows made from the same input change
_COMMAND = "launch/prepare_data.py in another work directory, or after deleting the folder"
STATISTICS = "statistics.json"
_PLACES = ("path", "interactions", "catalogue")


def prepare(
    data_config: Mapping, data_dir: str | os.PathLike, beam: Sequence[str] | None = None
) -> RecData:
    """Reads the source, makes the splits and writes them to data_dir; or reuses what is there.

    data_dir is reused if it was made with the same settings from the same input files (compared by
    their SHA-256). It is written atomically, with what every step left (filters.Step) and
    `summarise` in statistics.json. With the options of an Apache Beam pipeline that makes the rows
    and writes them, the same bytes.

    Raises TypeError for a key that is no field of DataConfig, FileNotFoundError for a missing file,
    UserError for bad settings or input, what `beam_rows.check` refuses, a failed download, or a
    data_dir with something else: data made otherwise (the message says what differs) or other
    files, or that another process writes.
    Nothing is overwritten.
    """
    config, data_dir = DataConfig(**data_config), Path(data_dir)
    if beam is not None:
        beam_rows.check(config, beam)
    files = _source_files(config)
    logging.info("Reading %s", ", ".join(map(str, files.values())))
    contents: dict[str, str | None] = {
        f"SHA-256 of {role}": file_sha256(path) for role, path in files.items()
    }
    if config.catalogue_is_optional:
        contents.setdefault("SHA-256 of catalogue", None)  # made without titles
    made_from = Provenance("data set", _COMMAND, _fields(config) | contents)
    if (there := _reused(data_dir, made_from)) is not None:
        return there
    report = Report()
    found = _read_source(config, files, report)
    with only_writer(data_dir):
        # Another process may have made the same meanwhile.
        if (there := _reused(data_dir, made_from)) is not None:
            return there
        with atomic_path(data_dir) as temporary:
            temporary.mkdir()
            _write(config, found, report, temporary, beam)
            made_from.save(temporary)
    return tfds_rec.read(data_dir)


def statistics(data_dir: str | os.PathLike) -> dict:
    """What `prepare` kept in statistics.json: what every step left, and `summarise`."""
    return read_json(Path(data_dir, STATISTICS), remedy=f"make it anew with {_COMMAND}")


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


@dataclass
class _Found:
    """What was read and is kept; the interactions until they are handed over."""

    catalogue: Catalogue
    interactions: Interactions | None

    def hand_over(self) -> Interactions:
        """The interactions, which whoever takes them may be the last to hold."""
        interactions, self.interactions = self.interactions, None
        assert interactions is not None
        return interactions


def _read_source(config: DataConfig, files: dict[str, Path], report: Report) -> RecData | _Found:
    if config.source == "published":
        return read_published(
            files["items"].parent,
            config.max_title_length,
            config.attributes,
            keep_spaces=config.title_spaces == "kept",
        )
    found = _Found(*_read_interactions(config, files, report))
    found.interactions = treat_duplicates(found.hand_over(), config.drop_duplicates)
    if config.drop_duplicates:
        report.add("data.drop_duplicates", found.interactions)
    found.interactions = filtered(found.hand_over(), config.filters, report)
    if config.filters.on or config.source in FORMATS:
        found = _Found(*only_used(found.catalogue, found.hand_over()))
    return found


def _reused(data_dir: Path, made_from: Provenance) -> RecData | None:
    """What is in a folder, made from the same; None if nothing is."""
    if not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir())):
        return None
    try:
        data = _read(data_dir, made_from.inputs)
    except FileNotFoundError as error:
        message = f"{data_dir} is not empty and holds no prepared data; choose another folder"
        raise UserError(message) from error
    logging.info("Reusing the prepared data in %s", data_dir)
    return data


def _write(
    config: DataConfig,
    found: RecData | _Found,
    report: Report,
    folder: Path,
    beam: Sequence[str] | None,
) -> None:
    """Makes the rows and writes them with their statistics."""
    histories = folder / "histories"
    if isinstance(found, RecData) or beam is None:
        made = found if isinstance(found, RecData) else _make_rows(config, found, histories)
        tfds_rec.write(made, folder, config.source)
        summary = summarise(made)
    else:
        workers = Workers(tuple(beam), histories.resolve())
        of_rows = config, found.catalogue, found.hand_over
        summary = beam_rows.write_rows(*of_rows, workers, folder.resolve())
    steps = [step._asdict() for step in report.steps]
    text = json.dumps({"steps": steps, **summary}, indent=1)
    remove(histories)
    write_text(folder / STATISTICS, text + "\n")


def _make_rows(config: DataConfig, found: _Found, folder: Path) -> MadeData:
    """The rows, whose items lie in a new folder."""
    interactions = found.hand_over()  # sorted, they are on the disk
    histories = sort_by_user(interactions, folder, config.seed, config.ties)
    user_ids = interactions.user_ids
    del interactions
    splits: Splits = build_splits(histories, config)
    if config.cold_items or config.cold_users:
        shares = config.cold_items, config.cold_users
        splits = hold_out(splits, *shares, config.seed, config.least_history)
    splits = sampled(splits, config.samples, config.sample_seed)
    for name, rows in splits.items():
        check_has_rows(name, len(rows))
    return MadeData(found.catalogue, splits, user_ids)


def _read_interactions(
    config: DataConfig, files: Mapping[str, Path], report: Report
) -> tuple[Catalogue, Interactions]:
    if config.source in FORMATS:
        return read_raw(
            config.source,
            files,
            reading=Reading(config.encoding, config.drop_invalid),
            ratings=bool(config.rating),
            texts=ItemTexts(
                config.attributes,
                config.needed_attributes,
                config.max_title_length,
                config.title_cleaning == "published",
            ),
            report=report,
        )
    if config.source == "movielens_100k":
        catalogue, interactions = read_movielens(
            files["catalogue"].parent, config.max_title_length, config.attributes, config.rating
        )
    else:
        catalogue, interactions = _read_tables(config, files)
    report.add("in the file", interactions)
    return catalogue, interactions


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
