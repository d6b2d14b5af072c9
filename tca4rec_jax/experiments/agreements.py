"""W/agreement: how far the lists of LLM lines agree with every CF model of their data.

A line and a CF model meet here whichever came first: the lists are in W/ranks, the logits in the CF
model's store. W/agreement/<key of the line>.json holds {CF model: `agreement`, and the store's
hash}.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging

from tca4rec_jax.cf.logits_format import StorePath
from tca4rec_jax.cf.logits_store import is_store, read_manifest, split_path
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.experiments.measures import AGREEMENT, agreement_with
from tca4rec_jax.experiments.results import CF, Cell, Line, RowRanks, read_lines
from tca4rec_jax.fileio import read_json, write_text

_STORE = "store"


def with_agreement(workdir: Path, line: Line) -> Line:
    """The line, and among its metrics what W/agreement has of it: {AGREEMENT: {CF model: ..}}."""
    found = _read(workdir, line)
    return dataclasses.replace(line, metrics={**line.metrics, AGREEMENT: found}) if found else line


def measure_agreement(
    workdir: Path, data: str, experiment: Experiment, rows: EvaluationRows
) -> None:
    """Measures what is missing of the lines of W that were ranked on these rows of data.

    A CF model that cannot be read is said and left out.
    """
    lines = read_lines(workdir)
    of_data = [(cell, line) for (cell, _), line in lines.items() if cell.data == data]
    models = {cell: line.cf_store for cell, line in of_data if cell.recommender == CF}
    for cell, line in of_data:
        if not cell.is_llm or line.split != rows.split:
            continue
        for model in _models_of(cell, models):
            try:
                store = split_path(str(workdir / models[model]), workdir, rows.split)
                _measure(workdir, line, str(model.cf), store, experiment, rows)
            except (OSError, UserError) as error:
                logging.warning("%s, agreement with %s: %s", cell.label, model.cf, error)


def _models_of(cell: Cell, models: Iterable[Cell]) -> list[Cell]:
    """Each CF model once: the cell's own, or that of the first seed."""
    found: dict[str | None, Cell] = {}
    for one in sorted(models, key=lambda one: one.cf_seed or 0):
        if one.cf not in found or (one.cf, one.cf_seed) == (cell.cf, cell.cf_seed):
            found[one.cf] = one
    return list(found.values())


def _measure(
    workdir: Path,
    line: Line,
    cf: str,
    path: StorePath,
    experiment: Experiment,
    rows: EvaluationRows,
) -> None:
    """Measures the agreement of a line with a CF model, unless that is there or cannot be."""
    known = _read(workdir, line)
    made_from = read_manifest(path)["content_hash"] if is_store(path) else None
    if made_from in (None, known.get(cf, {}).get(_STORE)):
        return
    ranks = RowRanks.read(workdir / line.ranks)
    if not np.array_equal(ranks.position_R, rows.position_R):
        return
    found = agreement_with(path, experiment, rows, ranks.items_RxM)
    known[cf] = {**found, _STORE: made_from}
    write_text(_file(workdir, line), json.dumps(known, allow_nan=False))


def _file(workdir: Path, line: Line) -> Path:
    return workdir / "agreement" / f"{line.key}.json"


def _read(workdir: Path, line: Line) -> dict[str, dict]:
    path = _file(workdir, line)
    return read_json(path, remedy="delete it") if path.exists() else {}
