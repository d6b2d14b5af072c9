"""Recommendations for a file of histories, resumable, by any number of processes.

The output has a row for every row of the input, in order: its fields and "items", "titles",
"scores". JSONL is appended to. A Parquet file is written at the end, a part of the rows at a time;
until then the lists are lines of OUTPUT.unfinished.
"""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from absl import logging

from tca4rec_jax.data.table_files import PARQUET, kind_of
from tca4rec_jax.decoding.histories import HISTORY, Histories
from tca4rec_jax.decoding.recommender import Recommended, Recommender
from tca4rec_jax.distributed.multihost import (
    broadcast_from_main,
    check_processes_agree,
    is_main_process,
    only_writing_job,
)
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path, file_sha256, remove, write_text
from tca4rec_jax.provenance import FILE, Provenance
from tca4rec_jax.terminal import Progress

COMMAND = "launch/recommend.py and another --output"
SUFFIXES = (".jsonl", *PARQUET)
"""Of the files that are written."""
_LISTS = {"items": pa.string(), "titles": pa.string(), "scores": pa.float32()}


def recommend_file(
    recommender: Recommender,
    source: str | Path,
    output: str | Path,
    *,
    k: int,
    chunk: int = 256,
) -> None:
    """Writes lists of k items for every row of `source`, at least `chunk` rows at a time.

    It goes on after the last whole chunk; what the lists were made from is in
    OUTPUT.provenance.json. All parts are searched with programs of one shape. All processes of a
    job call this alike: their devices share the rows of every batch, the first one writes.

    Raises as `Histories`, and before anything is loaded or written UserError for a history with an
    unknown item or an `output` of another suffix than SUFFIXES, StaleError for one that was begun
    from other inputs, LeaseError if another job writes it.
    """
    histories, output = Histories(source), Path(output)
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--output is {output}: expected a name that ends with {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}, as lists are written as JSON lines or Parquet, uncompressed"
        )
    sizes = recommender.sizes(_known(recommender, histories), k)
    inputs = recommender.inputs | {"k": k, "histories": file_sha256(histories.path)}
    made_from = Provenance("file of recommendations", COMMAND, inputs)
    check_processes_agree(made_from.fingerprint, "histories or LLM")
    file = _Output(output, kind_of(output) in PARQUET)
    if file.is_parquet:
        next(histories.tables())  # what no column can hold is refused before hours of work
    total, at_once = len(histories), -(-chunk // sizes.batch_size) * sizes.batch_size
    with only_writing_job(output):
        done = int.from_bytes(
            broadcast_from_main(lambda: file.begin(made_from, total, at_once).to_bytes(8), 8)
        )
        rows = histories.rows(done, [HISTORY] if file.is_parquet else None)
        with Progress("Recommending", total, "rows", done) as progress:
            while part := list(itertools.islice(rows, at_once)):
                try:
                    lists = recommender.recommend([row[HISTORY] for row in part], k, sizes=sizes)
                except FloatingPointError as error:  # it counts the rows of this part, from 0
                    where = f"{output}, of the rows from {done + 1} on"
                    raise FloatingPointError(f"{where}: {error}") from error
                if is_main_process():
                    file.append(part, lists)
                done += len(part)
                progress.advance(len(part))
        if is_main_process():
            file.finish(histories)


def _known(recommender: Recommender, histories: Histories) -> Iterator[list[str]]:
    """The histories. Raises UserError for an unknown item."""
    for number, row in enumerate(histories.rows(columns=[HISTORY]), start=1):
        recommender.find(row[HISTORY], f"{histories.path}, row {number}, {HISTORY}")
        yield row[HISTORY]


@dataclass(frozen=True)
class _Output:
    """The file that is written; the main process alone calls this."""

    path: Path
    is_parquet: bool

    @property
    def _lines(self) -> Path:
        """JSON lines with the lists of the rows so far."""
        return self.path.with_name(f"{self.path.name}.unfinished") if self.is_parquet else self.path

    def begin(self, made_from: Provenance, total: int, at_once: int) -> int:
        """How many rows are done, made from the same inputs: all, or whole chunks; cuts the rest.

        Raises UserError for a file that does not say what it was made from, StaleError for one that
        was made from other inputs.
        """
        about = self.path.with_name(f"{self.path.name}.{FILE}")
        begun = next((one for one in (self.path, self._lines) if one.exists()), None)
        if begun is None:
            write_text(about, made_from.to_json())
            return 0
        if not about.is_file():
            raise UserError(
                f"{begun} exists and does not say what it was made from (no {about.name}): choose "
                "another --output, or delete it"
            )
        Provenance.from_json(about.read_text("utf-8"), about).check(made_from.inputs, begun)
        if begun != self._lines:
            return total
        with begun.open("rb") as file:
            ends = [*itertools.accumulate(len(line) for line in file if line.endswith(b"\n"))]
        done = len(ends) if len(ends) == total else len(ends) - len(ends) % at_once
        os.truncate(begun, ends[done - 1] if done else 0)
        if done:
            logging.info("%s holds %d of the %d rows: going on", begun, done, total)
        return done

    def append(self, rows: Sequence[dict[str, Any]], lists: Sequence[list[Recommended]]) -> None:
        """Writes the lists of some rows; a Parquet file has the other fields from its source."""
        # Half a UTF-16 pair, which JSON can hold and UTF-8 can't, is escaped.
        with self._lines.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for row, found in zip(rows, lists, strict=True):
                line = {} if self.is_parquet else row
                line |= {
                    "items": [one.item_id for one in found],
                    "titles": [one.title for one in found],
                    "scores": [round(one.score, 5) for one in found],
                }
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    def finish(self, histories: Histories) -> None:
        """Makes the Parquet file of the source's columns and the lists, unless there is one."""
        if not self.is_parquet:
            return
        if not self.path.exists():
            with atomic_path(self.path) as temporary, self._lines.open(encoding="utf-8") as file:
                tables = (_with_lists(table, file) for table in histories.tables())
                first = next(tables)
                with pa.parquet.ParquetWriter(temporary, first.schema) as writer:
                    for table in itertools.chain([first], tables):
                        writer.write_table(table)
        remove(self._lines)


def _with_lists(table: pa.Table, lines: Iterator[str]) -> pa.Table:
    """Rows, and as further columns the lists of the next lines."""
    found = [json.loads(line) for line in itertools.islice(lines, len(table))]
    table = table.drop_columns([name for name in table.column_names if name in _LISTS])
    for name, kind in _LISTS.items():
        table = table.append_column(name, pa.array([one[name] for one in found], pa.list_(kind)))
    return table
