"""Rows made and written by Apache Beam: the bytes that one machine writes, from many workers.

The splits, the records and the summary of every part of the users are made by the functions of one
machine. What spans the parts (the cuts of a split by time, where a file begins, the sizes) Beam's
combiners add up exactly.

Axis letters: R rows; I items.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from tca4rec_jax.data import tfds_rec
from tca4rec_jax.data.beam_sort import (
    Given,
    UserPart,
    Workers,
    beam_module,
    check_options,
    combined,
    kept,
    pipeline_of,
    read_kept,
    save_given,
    sort_into_parts,
)
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import Interactions
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.records import write_parts
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, check_has_rows
from tca4rec_jax.data.settings import DataConfig
from tca4rec_jax.data.splits import (
    WITHOUT_TIMES,
    Users,
    check_cut,
    cut_rows,
    splits_of_some,
    targets_of,
)
from tca4rec_jax.data.summary import counts_of, seen_of, summary_of
from tca4rec_jax.data.windows import Histories, MadeData, Windows, even_parts
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path

_ITEMS_AT_ONCE = 1 << 20  # of rows on their way to a file
_COPIED_AT_ONCE = 1 << 18  # items of a file, in the order there
_BLOCKS = 1 << 14  # in which keys are counted

Keys = Mapping[str, np.ndarray]  # by split, of its rows in their order: int64 [R], ascending


@dataclass(frozen=True)
class SpreadRows:
    """Rows start, .., stop - 1 of a split, whose items the parts of the users hold."""

    split: str
    start: int
    stop: int
    num_items: int
    rated: bool

    def __len__(self) -> int:
        return self.stop - self.start

    def between(self, start: int, stop: int) -> "SpreadRows":
        """Some of them; `num_items` stays that of the split."""
        return replace(self, start=self.start + start, stop=self.start + stop)


def check(config: DataConfig, options: Sequence[str]) -> None:
    """Raises UserError if Beam is missing or refuses its options, or for fields that it cannot
    follow."""
    beam_module()
    unknown = {
        "data.source=published": config.source == "published",
        "data.ties=numbered": config.ties == "numbered",
        "data.samples": any(config.samples),
        "data.cold_items and data.cold_users": config.cold_items or config.cold_users,
    }
    if names := [name for name, is_set in unknown.items() if is_set]:
        raise UserError(f"--beam_runner does not do {', '.join(names)}: leave it out")
    check_options(options)


def write_rows(
    config: DataConfig,
    catalogue: Catalogue,
    hand_over: Callable[[], Interactions],
    workers: Workers,
    data_dir: Path,
) -> dict:
    """Makes the rows, writes the data set below data_dir, and gives what `summarise` gives of them.

    The interactions that `hand_over` gives stay in memory until they lie in the workers' folder, if
    nobody else holds them. Raises UserError as `build_splits` does, or where a disk lacks room.
    """
    given = _saved(config, hand_over(), workers)
    parts = sort_into_parts(given, workers)
    rows = partial(_rows, config=config, cuts=_cuts(parts, config, workers))
    sizes = combined(workers, parts, partial(_sizes, rows, _width(parts), catalogue.num_items))
    if config.split_by != "time":
        check_cut(np.array(sizes["cut"]), config)
    splits = {}
    for name in SPLITS:
        count = int(sizes[name].sum())
        check_has_rows(name, count)
        splits[name] = SpreadRows(name, 0, count, sizes["items"][name], given.rated)
    write = partial(_write_shards, workers, parts, rows, sizes)
    made = MadeData(catalogue, splits, given.user_ids)  # type: ignore[arg-type]
    tfds_rec.write(made, data_dir, config.source, write)
    counts = combined(workers, parts, partial(_summary, rows, sizes["seen"] > 0))
    return summary_of(catalogue, counts)


def _saved(config: DataConfig, interactions: Interactions, workers: Workers) -> Given:
    if config.split_by == "time" and not interactions.has_times:
        raise UserError(WITHOUT_TIMES)
    return save_given(interactions, config.seed, workers.folder)


_Rows = Callable[[UserPart], tuple[dict[str, Windows], Keys, list[int]]]


def _rows(
    part: UserPart, config: DataConfig, cuts: tuple[int, int] | None
) -> tuple[dict[str, Windows], Keys, list[int]]:
    """The rows of some users with their keys, and their `cut_counts`."""
    histories = Histories(part.folder)
    splits, counts = splits_of_some(histories, config, cuts)
    keys = {}
    for name, rows in splits.items():
        last_R = rows.start_R.astype(np.int64) + rows.length_R - 1
        by_place = cuts is not None and name != "train_sequences"
        keys[name] = histories.place[last_R].astype(np.int64) if by_place else part.start + last_R
    return splits, keys, counts


def _cuts(parts: Sequence[UserPart], config: DataConfig, workers: Workers):
    """Of a split by time, the places of the first target of validation and of test; else None."""
    if config.split_by != "time":
        return None
    keys, width = partial(_target_places, config.least_history), _width(parts)
    counts = combined(workers, parts, partial(_block_counts, keys, width))["targets"]
    ranks = cut_rows(int(counts.sum()), config)
    found = _keys_at(workers, parts, keys, width, {"targets": (counts, ranks)})
    return tuple(found["targets"].tolist())


def _width(parts: Sequence[UserPart]) -> int:
    """Keys that a block counts together: all lie below the number of interactions."""
    last = parts[-1]
    return -(-(last.start + len(Histories(last.folder).user)) // _BLOCKS)


def _target_places(min_history: int, part: UserPart) -> Keys:
    histories = Histories(part.folder)
    return {"targets": histories.place[targets_of(Users.of(histories), min_history)]}


def _block_counts(
    keys: Callable[[UserPart], Keys], width: int, part: UserPart
) -> dict[str, np.ndarray]:
    """How many keys every block has, int64 [_BLOCKS]."""
    return {
        name: np.bincount(of // width, minlength=_BLOCKS).astype(np.int64)
        for name, of in keys(part).items()
    }


def _keys_at(
    workers: Workers,
    parts: Sequence[UserPart],
    keys: Callable[[UserPart], Keys],
    width: int,
    wanted: Mapping[str, tuple[np.ndarray, Sequence[int]]],
) -> dict[str, np.ndarray]:
    """By name the keys of these ranks among all keys, given the counts of their blocks: exact, as
    the keys of these blocks are fetched."""
    blocks, within = {}, {}
    for name, (counts, ranks) in wanted.items():
        ends = np.cumsum(counts)
        blocks[name] = np.searchsorted(ends, ranks, side="right")
        within[name] = np.asarray(ranks) - (ends - counts)[blocks[name]]
    found = combined(workers, parts, partial(_keys_in, keys, width, blocks))
    at: dict[str, list[int]] = {name: [] for name in wanted}
    for name in wanted:
        key = np.sort(np.concatenate(found[name]))
        for block, number in zip(blocks[name], within[name], strict=True):
            at[name].append(int(key[np.searchsorted(key, block * width) + number]))
    return {name: np.array(of, np.int64) for name, of in at.items()}


def _keys_in(
    keys: Callable[[UserPart], Keys], width: int, blocks: Keys, part: UserPart
) -> dict[str, list[np.ndarray]]:
    of = keys(part)
    return {name: [of[name][np.isin(of[name] // width, block)]] for name, block in blocks.items()}


def _sizes(rows: _Rows, width: int, items: int, part: UserPart) -> dict[str, Any]:
    """The block counts of every split, its items, `cut_counts`, and how many parts of the users
    have an item in train_sequences."""
    splits, keys, counts = rows(part)
    _, seen_I = seen_of(splits["train_sequences"], items)
    return {
        **_block_counts(lambda _: keys, width, part),
        "items": Counter({name: of.num_items for name, of in splits.items()}),
        "cut": [counts],
        "seen": seen_I.astype(np.int32),
    }


def _summary(rows: _Rows, seen_I: np.ndarray, part: UserPart) -> dict[str, Any]:
    splits, *_ = rows(part)
    seen_U, _ = seen_of(splits["train_sequences"], len(seen_I))
    return {name: counts_of(of, seen_U, seen_I) for name, of in splits.items()}


def _keys_of(rows: _Rows, part: UserPart) -> Keys:
    return rows(part)[1]


# Files


def _write_shards(
    workers: Workers,
    parts: Sequence[UserPart],
    rows: _Rows,
    counts: Mapping[str, np.ndarray],
    shards: Sequence[tfds_rec.Shard],
) -> Iterator[int]:
    """Writes the shards of SpreadRows; the size of each."""
    files: dict[str, list[Path]] = {name: [] for name in SPLITS}
    ranks: dict[str, list[int]] = {name: [] for name in SPLITS}
    for shard in shards:
        spread, path = cast(SpreadRows, shard.rows), shard.path
        files[spread.split].append(path)
        if spread.start:
            ranks[spread.split].append(spread.start)
    wanted = {name: (counts[name], of) for name, of in ranks.items() if of}
    firsts: Keys = {name: np.empty(0, np.int64) for name in SPLITS}
    if wanted:
        keys = partial(_keys_of, rows)
        firsts = {**firsts, **_keys_at(workers, parts, keys, _width(parts), wanted)}
    beam, path = beam_module(), workers.folder / "written"
    with pipeline_of(workers) as pipeline:
        written = (
            pipeline
            | beam.Create(parts)
            | beam.Reshuffle()
            | "rows of files" >> beam.FlatMap(partial(_rows_of_files, rows, firsts, files))
            | "files" >> beam.GroupByKey()
            | "written" >> beam.MapTuple(_write_file)
        )
        kept(written, path)
    sizes = dict(read_kept(path)["sizes"])
    yield from (sizes[str(shard.path)] for shard in shards)


_KeyedRows = tuple[np.ndarray, ItemSequences]


def _rows_of_files(
    rows: _Rows, firsts: Keys, files: Mapping[str, Sequence[Path]], part: UserPart
) -> Iterator[tuple[str, _KeyedRows]]:
    """The rows of some users, some at a time, by their file; `firsts` are the keys with which the
    files but the first of a split begin."""
    splits, keys, _ = rows(part)
    for name, of_split in splits.items():
        file_R = np.searchsorted(firsts[name], keys[name], side="right")
        for number in np.unique(file_R).tolist():
            at = np.flatnonzero(file_R == number)
            windows, key_R = of_split.take(at), keys[name][at]
            for start, stop in even_parts(windows, _ITEMS_AT_ONCE):
                found = key_R[start:stop], windows.between(start, stop).copied()
                yield str(files[name][number]), found


def _write_file(path: str, found: Iterable[_KeyedRows]) -> dict[str, list[tuple[str, int]]]:
    """Writes an ArrayRecord file whole, so that a worker may try again; its size."""
    with atomic_path(Path(path)) as temporary:
        size = write_parts(_in_order([*found]), temporary)
    return {"sizes": [(path, size)]}


def _in_order(found: Sequence[_KeyedRows]) -> Iterator[ItemSequences]:
    """The rows of several by their keys, some at a time: all at once would be held twice."""
    keys, parts = zip(*found, strict=True)
    part_R = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    row_R = np.concatenate([np.arange(len(part)) for part in parts])
    order_R = np.argsort(np.concatenate(keys))
    count = -(-sum(part.num_items for part in parts) // _COPIED_AT_ONCE)
    for at_R in np.array_split(order_R, min(count, len(order_R))):
        yield _picked(parts, part_R[at_R], row_R[at_R])


def _picked(parts: Sequence[ItemSequences], part_R: np.ndarray, row_R: np.ndarray) -> ItemSequences:
    """Of each of the parts (int [R]) the row of a number (int [R])."""
    by_part_R = np.argsort(part_R, kind="stable")
    some = [parts[part].take(row_R[part_R == part]) for part in np.unique(part_R)]
    return _stacked(some).take(np.argsort(by_part_R))


def _stacked(parts: Sequence[ItemSequences]) -> ItemSequences:
    """The rows of several, one after the other."""
    items = Ragged.stack([Ragged(part.items, part.offsets) for part in parts])
    user_R, time_n = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "timestamps")
    )
    liked = [part.liked for part in parts if part.liked is not None]
    return ItemSequences(
        user_R, items.values, items.offsets, time_n, np.concatenate(liked) if liked else None
    )
