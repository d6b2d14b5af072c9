"""Recommendations for a file of histories: JSONL or CSV in, JSONL out, resumable.

A line of JSONL input is {"history": [items, oldest first]}, a row of a CSV has a column `history`
with the items separated by '|'; every other field is copied to the output, which has one line per
row, in order: those fields and "items", "titles", "scores".
"""

import json
import os
from pathlib import Path

from absl import logging
from tqdm import tqdm

from tca4rec_jax.data.table_files import kind_of, read_columns, read_json_objects
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import file_sha256, write_text
from tca4rec_jax.lease import only_writer
from tca4rec_jax.provenance import FILE, Provenance

COMMAND = "launch/recommend.py and another --output"


def read_histories(path: str | Path) -> list[dict]:
    """The rows of a file, each with its "history", a list of item ids or titles.

    Raises FileNotFoundError, or UserError naming file and row.
    """
    path = Path(path)
    kind = kind_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (expected .jsonl or .csv with histories)")
    if kind not in (".jsonl", ".csv"):
        raise UserError(f"{path} must end in .jsonl or .csv (perhaps in .gz after it)")
    rows = read_json_objects(path) if kind == ".jsonl" else read_columns(path).to_pylist()
    for number, row in enumerate(rows, start=1):
        history = row.get("history")
        if kind == ".csv" and history:
            row["history"] = history = [item.strip() for item in history.split("|")]
        if not (isinstance(history, list) and {*map(type, history)} == {str}):
            raise UserError(
                f"{path}, row {number}: history is {history!r}, expected item ids or titles, as "
                "a list of texts in JSONL or separated by '|' in CSV"
            )
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def recommend_file(
    recommender: Recommender,
    source: str | Path,
    output: str | Path,
    *,
    k: int,
    chunk: int = 256,
) -> None:
    """Writes lists of k items for every row of `source`, `chunk` rows at a time.

    It goes on where `output` ends; what the lists were made from is in OUTPUT.provenance.json. All
    parts are searched with programs of one shape. Raises as `read_histories`, and before anything
    is loaded or written UserError for a history with an unknown item, StaleError for an `output`
    that was begun from other inputs, LeaseError if another process writes it.
    """
    source, output = Path(source), Path(output)
    rows = read_histories(source)
    for number, row in enumerate(rows, start=1):
        recommender.find(row["history"], f"{source}, row {number}")
    inputs = recommender.inputs | {"k": k, "histories": file_sha256(source)}
    made_from = Provenance("file of recommendations", COMMAND, inputs)
    with only_writer(output):
        _go_on(recommender, rows, output, made_from, k=k, chunk=chunk)


def _go_on(
    recommender: Recommender,
    rows: list[dict],
    output: Path,
    made_from: Provenance,
    *,
    k: int,
    chunk: int,
) -> None:
    """Writes the lists of the rows that `output` lacks."""
    done = _lines_done(output, made_from)
    sizes = recommender.sizes([row["history"] for row in rows], k)
    if done:
        logging.info("%s holds %d of the %d rows: going on", output, done, len(rows))
    with (
        # Half a UTF-16 pair, which JSON can hold and UTF-8 can't, is escaped.
        output.open("a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(total=len(rows), initial=done, desc="Recommending", unit="row") as bar,
    ):
        for start in range(done, len(rows), chunk):
            part = rows[start : start + chunk]
            try:
                lists = recommender.recommend([row["history"] for row in part], k, sizes=sizes)
            except FloatingPointError as error:  # it counts the rows of this part, from 0
                where = f"{output}, of the rows from {start + 1} on"
                raise FloatingPointError(f"{where}: {error}") from error
            for row, found in zip(part, lists, strict=True):
                row["items"] = [one.item_id for one in found]
                row["titles"] = [one.title for one in found]
                row["scores"] = [round(one.score, 5) for one in found]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(part))


def _lines_done(output: Path, made_from: Provenance) -> int:
    """Complete lines that were made from the same inputs; cuts an incomplete line off."""
    path = output.with_name(f"{output.name}.{FILE}")
    if not output.exists():
        write_text(path, made_from.to_json())
        return 0
    if not path.is_file():
        raise UserError(
            f"{output} exists and does not say what it was made from (no {path.name}): choose "
            "another --output, or delete it"
        )
    Provenance.from_json(path.read_text("utf-8"), path).check(made_from.inputs, output)
    data = output.read_bytes()
    os.truncate(output, data.rfind(b"\n") + 1)
    return data.count(b"\n")
