"""Interactions sorted by time and by user with Apache Beam, as `ordering.sort_by_user` does.

They go from files in a folder that all workers see through two sorts: by time, where each gets its
place, and by user. Every part of the users then has a folder of its own, as the Histories of one
machine.
"""

import io
import logging
import operator
import pickle
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.ordering import ELSEWHERE, index_type, shuffled
from tca4rec_jax.data.signals import stopped_by_signals
from tca4rec_jax.data.windows import Histories
from tca4rec_jax.errors import UserError, one_line
from tca4rec_jax.fileio import atomic_path, check_room, remove

_IN_A_PART = 1 << 19  # interactions that a worker sorts, or of the users that it holds
_READ_AT_ONCE = 1 << 18
_SAMPLE = 1 << 20  # times that say where the parts of the sort begin
_FLAGS = "--beam_runner, --beam_options"
# What is left of an OSError in the RuntimeError that Beam makes of it, or of a worker's traceback.
_OF_THE_SYSTEM = re.compile(r"\[Errno \w+\].*")

Columns = dict[str, np.ndarray]  # [n] each


class Workers(NamedTuple):
    """A runner's options (as on its command line), and a folder that all of its workers see."""

    options: tuple[str, ...]
    folder: Path


class Given(NamedTuple):
    """What is known of the interactions that lie in the folder of the workers.

    Attributes:
      user_ids: as of Interactions.
      num_interactions: how many they are.
      timed, rated: whether their times and ratings are known.
      first_times: int64, with which the parts of the time begin, but the first.
      first_users: int64, with which the parts of the users begin, but the first.
    """

    user_ids: tuple[str, ...]
    num_interactions: int
    timed: bool
    rated: bool
    first_times: np.ndarray
    first_users: np.ndarray


class UserPart(NamedTuple):
    """The histories of some users, and the number of their first interaction among all."""

    folder: Path
    start: int


def beam_module() -> Any:
    """apache_beam; raises UserError where it is missing."""
    try:
        import apache_beam
    except ImportError as error:
        raise UserError(
            "--beam_runner needs Apache Beam: install launch/locks/beam.txt into an environment of "
            'its own (or pip install ".[beam]")'
        ) from error
    return apache_beam


@contextmanager
def pipeline_of(workers: Workers) -> Iterator[Any]:
    """A new pipeline, which runs at the end of its block.

    Raises what the handler of a signal raises, UserError where a worker cannot read or write.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    options = PipelineOptions([*workers.options])
    try:
        with stopped_by_signals(), _said_once(), beam_module().Pipeline(options=options) as made:
            yield made
    except RuntimeError as error:
        if (found := _OF_THE_SYSTEM.search(str(error))) is None:
            raise
        raise UserError(
            f"{workers.folder}: a worker of Beam failed there: {one_line(found[0], 300)}: all of "
            f"them need this folder, and room on its disk: make room, or {ELSEWHERE}"
        ) from error


@contextmanager
def _said_once() -> Iterator[None]:
    """Without what Beam logs of a step's error, with its traceback: it raises that error too."""
    log = logging.getLogger("apache_beam.runners.common")  # of nothing else
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


def check_options(options: Sequence[str]) -> None:
    """Raises UserError for a runner or options that Beam refuses; runs nothing."""
    from apache_beam.options.pipeline_options import PipelineOptions

    said = io.StringIO()
    try:
        made = PipelineOptions([*options])  # gives logging the true stderr, if nobody did
        with redirect_stderr(said):
            made.get_all_options(retain_unknown_options=True)  # as a run parses them
            pipeline = beam_module().Pipeline(options=made)
    except SystemExit as error:  # of argparse, which says why on stderr
        why = one_line(said.getvalue().rpartition("error: ")[2])
        raise UserError(f"{_FLAGS}: {why or 'expected those of a run, without --help'}") from error
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"{_FLAGS}: {one_line(error)}") from error
    remove(Path(pipeline.local_tempdir))  # as at the end of a run


def combined(
    workers: Workers, elements: Sequence, measure: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` gives of the elements, added by name."""
    # A file of its own: a runner may try the last step again, after the next pipeline has begun.
    beam, path = beam_module(), workers.folder / f"combined-{uuid.uuid4().hex}"
    with pipeline_of(workers) as pipeline:
        given = pipeline | beam.Create(elements) | beam.Reshuffle()
        kept(given | "measured" >> beam.Map(measure), path)
    found = read_kept(path)
    path.unlink()
    return found


def kept(measured: Any, path: Path) -> None:
    """Adds up a PCollection of dicts, into a file."""
    beam = beam_module()
    added = measured | beam.CombineGlobally(_added).without_defaults()
    _ = added | "kept" >> beam.Map(partial(_keep, path))


def read_kept(path: Path) -> dict[str, Any]:
    """What `kept` added up."""
    return pickle.loads(path.read_bytes())


def _added(found: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found = list(found)
    return {name: reduce(operator.add, [one[name] for one in found]) for name in found[0]}


def _keep(path: Path, found: object) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(found))


def save_given(interactions: Interactions, seed: int, folder: Path) -> Given:
    """Puts into a new folder what the sorts read.

    Raises UserError if its disk lacks room for that and for the parts of the users.
    """
    count, timed = len(interactions.user), interactions.has_times
    columns = {
        name: column
        for name in ("user", "item", "timestamp", "rating")
        if (column := getattr(interactions, name)) is not None
    }
    given, places = sum(column.nbytes for column in columns.values()), index_type(count).itemsize
    num_bytes = 2 * given + (1 + timed) * count * places
    check_room(folder.parent, num_bytes, "the interactions and their sorted parts", ELSEWHERE)
    folder.mkdir()
    for name, column in columns.items():
        np.save(folder / f"{name}.npy", column)
    if timed:
        np.save(folder / "shuffled.npy", shuffled(count, seed))
    parts = -(-count // _IN_A_PART)
    sample = np.sort(interactions.timestamp[:: -(-count // _SAMPLE)])
    first_times = np.unique(sample[np.arange(1, parts) * len(sample) // parts])
    ends = np.cumsum(np.bincount(interactions.user))  # of users, among the interactions
    first_users = np.unique(np.searchsorted(ends, np.arange(1, parts) * _IN_A_PART))
    rated = interactions.rating is not None
    return Given(interactions.user_ids, count, timed, rated, first_times, first_users)


def sort_into_parts(given: Given, workers: Workers) -> list[UserPart]:
    """The interactions by user and time, in a folder for each part of the users."""
    beam, folder, count = beam_module(), workers.folder, given.num_interactions
    starts = range(0, count, _READ_AT_ONCE)
    with pipeline_of(workers) as pipeline:
        read = (
            pipeline
            | beam.Create([(start, min(start + _READ_AT_ONCE, count)) for start in starts])
            | beam.Reshuffle()
            | "read" >> beam.Map(partial(_given, folder, index_type(count)))
        )
        if given.timed:
            by_time = partial(_parted, "timestamp", given.first_times)
            of_time = read | "by time" >> beam.FlatMap(by_time)
            sizes = (
                of_time
                | "sizes" >> beam.MapTuple(_size)
                | "sizes of parts" >> beam.CombinePerKey(sum)
            )
            read = (
                of_time
                | "parts of time" >> beam.GroupByKey()
                | "places" >> beam.Map(partial(_in_time, folder), beam.pvalue.AsDict(sizes))
            )
        of_users = (
            read
            | "by user" >> beam.FlatMap(partial(_parted, "user", given.first_users))
            | "parts of users" >> beam.GroupByKey()
            | "histories" >> beam.MapTuple(partial(_save_histories, folder))
        )
        kept(of_users, folder / "parts")
    found = sorted(read_kept(folder / "parts")["parts"])
    ends = np.cumsum([size for _, size in found])
    return [
        UserPart(_part_folder(folder, number), int(end) - size)
        for (number, size), end in zip(found, ends, strict=True)
    ]


def _given(folder: Path, place_type: np.dtype, bounds: tuple[int, int]) -> Columns:
    """Some interactions as they were given, which is their place so far."""
    whole = Histories(folder)
    names = ("user", "item", "timestamp", *(["rating"] if whole.rating is not None else []))
    columns = {name: np.array(getattr(whole, name)[slice(*bounds)]) for name in names}
    return columns | {"place": np.arange(*bounds, dtype=place_type)}


def _parted(name: str, edges: np.ndarray, columns: Columns) -> Iterator[tuple[int, Columns]]:
    """The rows by the part in which their value of a column is."""
    part_n = np.searchsorted(edges, columns[name], side="right")
    for part in np.unique(part_n).tolist():
        yield part, _taken(columns, np.flatnonzero(part_n == part))


def _size(part: int, columns: Columns) -> tuple[int, int]:
    return part, len(columns["place"])


def _taken(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def _joined(parts: Iterable[Columns]) -> Columns:
    found = list(parts)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _in_time(
    folder: Path, of_part: tuple[int, Iterable[Columns]], sizes: Mapping[int, int]
) -> Columns:
    """A part of the time in the order of `ordering.sort_by_user`, with the places there."""
    part, found = of_part
    columns = _joined(found)
    start = sum(size for other, size in sizes.items() if other < part)
    places = slice(start, start + sizes[part])
    keys = (columns[name] for name in ("place", "item", "user", "timestamp"))
    columns = _taken(columns, np.lexsort([*keys]))
    shuffled_n = np.load(folder / "shuffled.npy", mmap_mode="r")[places]
    columns = _taken(columns, np.lexsort([shuffled_n, columns["timestamp"]]))
    place_n = np.arange(places.start, places.stop, dtype=columns["place"].dtype)
    return columns | {"place": place_n}


def _part_folder(folder: Path, part: int) -> Path:
    return folder / f"users-{part}"


def _save_histories(folder: Path, part: int, found: Iterable[Columns]) -> dict:
    """Writes the Histories of a part of the users."""
    columns = _joined(found)
    columns = _taken(columns, np.lexsort([columns["place"], columns["user"]]))
    for name, column in columns.items():
        path = _part_folder(folder, part) / f"{name}.npy"
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, column)
    return {"parts": [_size(part, columns)]}
