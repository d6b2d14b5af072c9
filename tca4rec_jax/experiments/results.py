"""W/results.jsonl and W/ranks: what the finished cells of a grid left, one line each.

A line is appended under a lock and is on the disk before anything else is done; the torn end that a
killed process left is cut off by the next writer and passed over by readers. Of two lines of one
cell and split the later one counts.

Axis letters: R rows, M places of a list, T temperatures.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.kept_rankings import hit_ranks
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_npz, sync, write_npz
from tca4rec_jax.metrics import mean_metrics
from tca4rec_jax.provenance import Provenance

FILE = "results.jsonl"
CF, POPULAR = "cf", "popular"
"""The recommenders that are no LLM: the CF model itself, and the most popular items."""
VALIDATION, TEST = "validation", "test"
"""The splits whose rows are ranked."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a grid, in plain values; None where nothing depends on an axis.

    Attributes:
      data, recommender, cf: names in the grid; the recommender may be CF or POPULAR.
      cf_seed: of the CF model.
      alpha, beta, tau, form, softmax: fields of config.objective.
      seed: of the run.
      steps: training.steps.
      guidance: weight of the CF model in a beam's score.
    """

    data: str
    recommender: str
    cf: str | None = None
    cf_seed: int | None = None
    alpha: float | None = None
    beta: float | None = None
    tau: float | None = None
    form: str | None = None
    softmax: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None

    @property
    def is_llm(self) -> bool:
        """Whether it has an LLM run."""
        return self.recommender not in (CF, POPULAR)

    @property
    def label(self) -> str:
        """In words, what is set of it: 'movielens titles cf=sasrec alpha=0.1 ..'."""
        fields = dataclasses.asdict(self)
        named = [fields.pop("data"), fields.pop("recommender")]
        set_ = (f"{name}={_shown(value)}" for name, value in fields.items() if value is not None)
        return " ".join([*named, *set_])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of results.jsonl: a finished cell on the rows of a split.

    Attributes:
      key: the fingerprint of all that the result depends on.
      cell: what was asked for.
      split: 'validation' or 'test'.
      rows, users: how many.
      metrics: means over rows: 'hr@K', 'ndcg@K', 'nll per title' (not of guided lists; at the
        temperature that is best on these rows if they are for validation, else at 1), and what else
        was measured.
      ranks: the file of the rows' ranks, relative to W.
      seconds: wall, of 'train', 'evaluate' and 'measure', also of killed processes as far as what
        they did was kept; the training of a run that several cells share stands in each of them.
      core_seconds: CPU seconds of all these, at the rate of the process that ended them.
      machine: host and device.
      provenance: that of the result, as Provenance.from_fields reads it.
      validations: {step: {metric: value}} of the run's training.
      run, cf_store: folders relative to W, '' where there is none.
    """

    key: str
    cell: Cell
    split: str
    rows: int
    users: int
    metrics: Mapping[str, Any]
    ranks: str
    seconds: Mapping[str, float]
    core_seconds: float
    machine: str
    provenance: Mapping[str, Any]
    validations: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    run: str = ""
    cf_store: str = ""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Line":
        """Of what a line of the file holds; further fields are passed over."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in fields.items() if name in names}
        return cls(**{**known, "cell": Cell(**known["cell"])})

    def to_json(self) -> str:
        """The line, without its end."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    def on_cores(self, cores: float) -> "Line":
        """The line of a process that kept so many cores busy."""
        return dataclasses.replace(self, core_seconds=cores * sum(self.seconds.values()))

    @property
    def made_from(self) -> Provenance:
        """What the result was made from."""
        return Provenance.from_fields(self.provenance, self.cell.label)


class RowRanks(NamedTuple):
    """What a cell did on each row: W/ranks/<key>.npz."""

    user_R: np.ndarray  # int32
    target_R: np.ndarray  # int32
    rank_R: np.ndarray  # int32, 0-based, -1: not ranked
    nll_RxT: np.ndarray  # float32, at each temperature; NaN if it has none
    items_RxM: np.ndarray  # int32, the list, -1 where there are no more
    position_R: np.ndarray  # int64, the flat position of each target in the split
    temperature_T: np.ndarray  # float64, evaluation.temperatures; NaN: the best on these rows

    @classmethod
    def of(cls, experiment: Experiment, rows: EvaluationRows, ranking: ModelRanking) -> "RowRanks":
        """Of a ranking of rows; hits are as evaluation.hits says."""
        evaluation = experiment.config.evaluation
        return cls(
            user_R=rows.sequences.user,
            target_R=rows.target_R,
            rank_R=hit_ranks(ranking, evaluation.hits),
            nll_RxT=ranking.nll_RxT,
            items_RxM=ranking.items_RxM,
            position_R=rows.position_R,
            temperature_T=np.array(evaluation.temperatures, np.float64),
        )

    @classmethod
    def read(cls, path: Path) -> "RowRanks":
        """Raises UserError for a file that is missing or damaged."""
        saved = read_npz(path, remedy="compute its cell anew (launch/experiments.py --anew)")
        if "nll_R" in saved:  # once only the best on these rows was kept
            saved |= {"nll_RxT": saved["nll_R"][:, None], "temperature_T": np.array([np.nan])}
        return cls(*(saved[name] for name in cls._fields))

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_npz(path, **self._asdict())

    @property
    def best_temperature(self) -> float:
        """That of the lowest mean NLL on these rows; NaN if it was not kept."""
        return float(self.temperature_T[np.argmin(self.nll_RxT.mean(axis=0))])

    def nll_R(self, temperature: float) -> np.ndarray:
        """float32 [R], at that of the temperatures which is nearest; NaN if there is none."""
        distance_T = np.abs(np.log(self.temperature_T / temperature))
        return self.nll_RxT[:, np.argmin(distance_T)]

    def metrics(self, cutoffs: tuple[int, ...], temperature: float = 1.0) -> dict[str, float]:
        """Means over the rows: 'hr@K' and 'ndcg@K', and the NLL if there is one."""
        found = mean_metrics(self.rank_R, cutoffs)
        nll = float(self.nll_R(temperature).mean(dtype=np.float64))
        return found if np.isnan(nll) else found | {NLL: nll}


def read_lines(workdir: Path) -> dict[tuple[Cell, str], Line]:
    """{(cell, split): its line} of W; a half-written end is left out.

    Raises UserError for a damaged line before the end: what follows it would be done for ever.
    """
    path = workdir / FILE
    whole, _, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            lines.append(Line.from_json(json.loads(text)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number} is damaged ({error}): delete it") from error
    return {(line.cell, line.split): line for line in lines}


def workdirs(workdir: Path) -> list[Path]:
    """The work directories of a grid's data sets, or the one given if it is none of a grid."""
    is_grid = (workdir / FILE).is_file()
    found = sorted(path.parent for path in workdir.glob("*/data/")) if is_grid else []
    return found or [workdir]


def append(workdir: Path, *lines: Line) -> None:
    """Appends lines to W/results.jsonl at once, after cutting off what a killed writer left."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / FILE
    with path.open("ab+") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole != file.seek(0, os.SEEK_END):
            file.truncate(whole)
        file.write("".join(f"{line.to_json()}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
    sync(workdir)
