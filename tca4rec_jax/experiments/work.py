"""The work of one process on a grid: data, CF models, runs and rankings, each made once.

What is there already is found by what it was made from, as the launch scripts find it; another
process that makes a part holds its lease (LeaseError).

Axis letters: R rows.
"""

import dataclasses
import hashlib
import platform
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tca4rec_jax.cf.logits_store import open_store, read_manifest, split_path
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import build, ranked_by, score_weights
from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.data.templates import reads_users, shows_ids
from tca4rec_jax.embedding import embed_items
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation import rankings
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.llm_rankings import cf_content, rank_llms, ranking_inputs
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.experiments.agreements import measure_agreement
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.fluency import fluency
from tca4rec_jax.experiments.measures import FLUENCY
from tca4rec_jax.experiments.results import (
    CF,
    POPULAR,
    VALIDATION,
    Cell,
    Line,
    RowRanks,
    append,
    read_lines,
)
from tca4rec_jax.fileio import atomic_path, read_json_lines, remove, write_npz
from tca4rec_jax.lease import only_writer
from tca4rec_jax.llm.from_scratch import RANDOM
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.semantic_ids.ids import ids_path
from tca4rec_jax.semantic_ids.pipeline import make_ids
from tca4rec_jax.semantic_ids.rq_vae import RQVAEConfig
from tca4rec_jax.semantic_ids.settings import Quantiser
from tca4rec_jax.train import train
from tca4rec_jax.training.run_folder import COMMAND as TRAIN
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.validation import validations_of

COMMAND = "launch/experiments.py --anew"


class Job(NamedTuple):
    """What is done at once: cells of one run and one CF model, on the rows of a split.

    Attributes:
      name: of all such cells, whichever of them are missing.
      cells: that are missing.
      split: of the rows.
    """

    name: str
    cells: tuple[Cell, ...]
    split: str


def as_jobs(ranked: Iterable[tuple[Cell, str]]) -> list[Job]:
    """The jobs of cells and splits, in their order."""
    found: dict[tuple[Cell, str], list[Cell]] = {}
    for cell, split in ranked:
        of_job = dataclasses.replace(cell, guidance=None)
        found.setdefault((of_job, split), []).append(cell)
    return [
        Job(f"{of_job.label}, {split}", tuple(missing), split)
        for (of_job, split), missing in found.items()
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Does jobs; `anew` replaces runs that were made from other inputs instead of refusing them."""

    cells: Cells
    anew: bool = False

    @property
    def workdir(self) -> Path:
        """W."""
        return self.cells.workdir

    def do(self, job: Job) -> None:
        """Trains and ranks, and appends the lines of the job's cells.

        Raises UserError or FloatingPointError as the parts do, LeaseError if another process makes
        one of them, Stopped or SystemExit if this one was asked to stop: what is done is kept.
        """
        try:
            self._do(job)
        finally:
            self._free()

    def _do(self, job: Job) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        cell = job.cells[0]
        self._prepare(cell)
        run = self._trained(cell) if cell.is_llm else None
        began = time.perf_counter()
        experiment = self.experiment(cell)
        rows = self._rows(experiment, job.split)
        self._write_rows(cell.data, experiment, rows)
        spent: dict[str, float] = {}
        ranked = self._rank(experiment, rows, job, spent)
        evaluated = time.perf_counter() - began + sum(spent.values())
        seconds = {"evaluate": evaluated / len(job.cells)}
        log = read_json_lines(run.log) if run else []
        validations = validations_of(log)
        validated = sum(of.pop("seconds") for of in validations.values())
        seconds["train"] = validated + sum(one["seconds"] for one in log if "seconds" in one)
        shared = {
            "split": job.split,
            "rows": len(rows),
            "users": len(np.unique(rows.sequences.user)),
            "seconds": seconds,
            "machine": f"{platform.node()}: {jax.device_count()} x {jax.devices()[0].device_kind}",
            "validations": {str(step): of for step, of in validations.items()},
            "run": str(run.path.relative_to(self.workdir)) if run else "",
        }
        lines = [
            self._line(one, experiment, rows, *found, shared)
            for one, found in zip(job.cells, ranked, strict=True)
        ]
        cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
        append(self.workdir, *(line.on_cores(cores) for line in lines))  # all: ranked together
        for line in lines:
            logging.info("%s, %s: %s", line.cell.label, job.split, self._shown(line))
        measure_agreement(self.workdir, cell.data, experiment, rows)

    def measure_agreement(self) -> None:
        """Measures what no job has left of the agreement of lines with CF models of their data.

        As of lines that were there before a CF model was, if no job on their data has come since.
        Data that cannot be read are said and left out.
        """
        for data, split in dict.fromkeys((cell.data, on) for cell, on in read_lines(self.workdir)):
            if data not in self.cells.grid.data or not (self.workdir / data / "data").exists():
                continue
            try:
                experiment = self.experiment(Cell(data, POPULAR))
                measure_agreement(self.workdir, data, experiment, self._rows(experiment, split))
            except (OSError, UserError) as error:
                logging.warning("agreement with CF models on %s: %s", data, error)

    def _line(
        self,
        cell: Cell,
        experiment: Experiment,
        rows: EvaluationRows,
        ranking: ModelRanking,
        inputs: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> Line:
        """The line of a cell, whose ranks are written; `shared` are the fields of its job."""
        made_from = Provenance("cell of a grid", COMMAND, inputs)
        config, key = experiment.config, made_from.fingerprint
        ranks, began = RowRanks.of(experiment, rows, ranking), time.perf_counter()
        ranks.write(self.workdir / f"ranks/{key}.npz")
        temperature = ranks.best_temperature if rows.split == VALIDATION else 1.0
        metrics: dict[str, Any] = ranks.metrics(config.evaluation.cutoffs, temperature)
        if cell.is_llm and not cell.guidance:
            decoder = experiment.inference_decoder(config.run)
            metrics[FLUENCY] = fluency(experiment, rows, decoder)
        logits = "" if cell.cf is None else Path(config.cf.logits).relative_to(self.workdir)
        return Line(
            key=key,
            cell=cell,
            metrics=metrics,
            ranks=f"ranks/{key}.npz",
            provenance=dataclasses.asdict(made_from),
            cf_store=str(logits),
            core_seconds=0.0,  # the job's, when it is done
            **{**shared, "seconds": {**shared["seconds"], "measure": time.perf_counter() - began}},
        )

    def _shown(self, line: Line) -> str:
        """The metric that guidance is chosen by, and the NLL if there is one."""
        names = self.cells.grid.guided_metric, NLL
        return ", ".join(f"{n} {line.metrics[n]:.4f}" for n in names if n in line.metrics)

    def changed(self, line: Line) -> list[str]:
        """In words, what a line's result was made from that is other now.

        Raises UserError or FileNotFoundError if a part that it was made from is missing.
        """
        experiment, cell = self.experiment(line.cell), line.cell
        rows = self._rows(experiment, line.split)
        if not cell.is_llm:
            return line.made_from.differences(self._cf_inputs(experiment, rows, cell))
        weights = [score_weights(experiment.config, cell.guidance or 0.0)]
        now = experiment.inference_inputs | experiment.search_inputs(weights) | rows.inputs()
        now |= ranked_by(experiment.config)
        if cell.guidance or reads_users(experiment.config.prompt):
            now["CF logits of the rows"] = cf_content(experiment, rows)
        run = Provenance("LLM run", TRAIN, self._training(cell).training_inputs)
        found = line.made_from.differences(now | {"run.made_from": run.fingerprint})
        folder = self.cells.run_folder(cell)
        if found and folder.path.is_dir():  # in more than a hash's words
            found += folder.made_from.differences(run.inputs)
        return found

    def experiment(self, cell: Cell) -> Experiment:
        """Of a cell; experiments of one recommender on data share what they read."""
        config = self.cells.config_of(cell)
        pair = (cell.data, cell.recommender) if cell.is_llm else self.cells.pair_on(cell.data)
        of = (*pair, config.seed if config.llm.weights == RANDOM else None)
        before = self._latest.get(of, Experiment(config, self.workdir / cell.data))
        self._latest[of] = before.sharing(config)
        return self._latest[of]

    def _training(self, cell: Cell) -> Experiment:
        """Of the run of a cell, whatever its guidance."""
        return self.experiment(self.cells.run_of(cell))

    @cached_property
    def _latest(self) -> dict[tuple, Experiment]:
        """The latest experiment of each recommender on data, from which the next one takes over."""
        return {}

    def _free(self) -> None:
        """Lets go of weights and programs."""
        for of, one in self._latest.items():
            self._latest[of] = one.sharing(one.config)
        jax.clear_caches()

    @cached_property
    def _there(self) -> set[Any]:
        """What this process has made or found."""
        return set()

    def _prepare(self, cell: Cell) -> None:
        """Makes what the cell's run and ranking read."""
        config = self.cells.config_of(cell)
        data = self._data(cell, config)
        for one in self._cf_models(cell):
            self._cf(one, data)
        recommender = cell.recommender if cell.is_llm else self.cells.pair_on(cell.data)[1]
        if maker := self.cells.cf_of_vectors(cell.data, recommender):
            self._cf(maker, data)
            self._item_vectors(maker, data)
        if shows_ids(config.prompt) and config.ids.path is None:
            self._ids(cell, config, data)

    def _cf_models(self, cell: Cell) -> list[Cell]:
        """One of each CF model on the cell's data, its own or that of the first seed."""
        found: dict[str | None, Cell] = {cell.cf: cell} if cell.cf else {}
        for one in self.cells.all:
            if one.recommender == CF and one.data == cell.data:
                found.setdefault(one.cf, one)
        return list(found.values())

    def _data(self, cell: Cell, config: ConfigDict) -> RecData:
        if cell.data not in self._there:
            prepare(config.data, self.workdir / cell.data / "data")
            self._there.add(cell.data)
        return self.experiment(cell).data

    def _cf(self, cell: Cell, data: RecData) -> None:
        of = Cell(cell.data, CF, cell.cf, cell.cf_seed)
        if of in self._there:
            return
        config = self.cells.config_of(of)
        length = config.data.history_length
        run_cf(config.cf, data, self.cells.cf_folder(of), history_length=length)
        self._there.add(of)

    def _item_vectors(self, maker: Cell, data: RecData) -> None:
        """Writes the item table of a CF model for recommenders that name it, unless it is there."""
        path = self.cells.vectors_file(maker)
        if path in self._there:
            return
        split, no_rows = "train_sequences", np.zeros(0, np.int64)
        where = split_path(self.cells.config_of(maker).cf.logits, self.workdir, split)
        store = open_store(where, data.splits[split], data.catalogue, positions=no_rows)
        if store.item_table is None:
            raise UserError(f"the CF model {maker.cf!r} of the grid has no item vectors")
        table_IxD = np.asarray(store.item_table, np.float32)
        if not path.exists() or not np.array_equal(np.load(path), table_IxD):
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, table_IxD)
        self._there.add(path)

    def _ids(self, cell: Cell, config: ConfigDict, data: RecData) -> None:
        """Makes semantic ids: of a CF model's item vectors, or of titles that an LLM embeds."""
        workdir = self.workdir / cell.data
        if ids_path(None, workdir) in self._there:
            return
        of_data = self.cells.config_of_data(cell.data)  # whatever the cell's CF model
        if config.ids.item_vectors is None:
            embed_items(Experiment(of_data, workdir))
        parts = build(Quantiser, config.ids), build(RQVAEConfig, config.ids.rq_vae)
        make_ids(data, workdir, *parts, path=None, cf=of_data.cf, beta=of_data.objective.beta)
        self._there.add(ids_path(None, workdir))
        self._latest.clear()  # which may have read others

    def _trained(self, cell: Cell) -> RunFolder:
        """The finished run of a cell."""
        experiment = self._training(cell)
        run = RunFolder(experiment.directory)
        made_from = Provenance("LLM run", TRAIN, experiment.training_inputs)
        if self.anew and run.saved_steps and run.made_from.fingerprint != made_from.fingerprint:
            with only_writer(run.path):
                remove(run.path)
        if run.unfinished:
            train(experiment)
        return run

    def _rows(self, experiment: Experiment, split: str) -> EvaluationRows:
        config = experiment.config
        of_split = config.validation.rows if split == VALIDATION else config.evaluation.rows
        return EvaluationRows.sample(experiment, split, of_split)

    def _write_rows(self, data: str, experiment: Experiment, rows: EvaluationRows) -> None:
        """W/rows/<data>-<split>.npz: what analyses need of the rows."""
        path = self.workdir / "rows" / f"{data}-{rows.split}.npz"
        if path in self._there:
            return
        items = experiment.data.catalogue.num_items
        write_npz(
            path,
            user_R=rows.sequences.user,
            target_R=rows.target_R,
            position_R=rows.position_R,
            history_R=rows.histories.lengths,
            count_I=np.bincount(experiment.data.splits["train_sequences"].items, minlength=items),
        )
        self._there.add(path)

    def _rank(
        self, experiment: Experiment, rows: EvaluationRows, job: Job, spent: dict[str, float]
    ) -> list[tuple[ModelRanking, Mapping[str, Any]]]:
        """What each cell does on the rows, and what that depends on; `spent` as `rank_llms`."""
        cell, config = job.cells[0], experiment.config
        if cell.is_llm:
            labels = {str(one.guidance): one.guidance or 0.0 for one in job.cells}
            found = rank_llms(experiment, rows, {config.run: labels}, spent)
            weights = {label: [score_weights(config, one)] for label, one in labels.items()}
            made_from = {"run": self.cells.run_folder(cell).made_from.inputs}
            return [
                (
                    found[label],
                    ranking_inputs(experiment, rows, config.run, weights[label]) | made_from,
                )
                for label in labels
            ]
        label = rankings.POPULAR if cell.recommender == POPULAR else rankings.CF
        with_cf = experiment if cell.cf else self.experiment(self._cf_models(cell)[0])
        models = rankings.cf_models(with_cf, rows)
        found = rankings.rank_cf_models(experiment, rows, {label: models[label]})
        return [(found[label], self._cf_inputs(experiment, rows, cell))]

    def _cf_inputs(
        self, experiment: Experiment, rows: EvaluationRows, cell: Cell
    ) -> dict[str, Any]:
        """What the ranking of a CF model, or of the most popular, depends on: provenance."""
        config, data = experiment.config, experiment.data
        inputs = rows.inputs() | ranked_by(config)
        inputs |= {
            "catalogue": data.catalogue.content_hash(),
            "allowed items": experiment.item_filter.content_hash(),
            "evaluation.hits": config.evaluation.hits,
            "items of one title": _same_leaf(experiment.trie.leaf_of_item),
        }
        if cell.cf is None:
            return inputs | {"training rows": data.splits["train_sequences"].content_hash()}
        store = split_path(config.cf.logits, experiment.workdir, rows.split)
        return inputs | {"CF logits": read_manifest(store)["content_hash"]}


def _same_leaf(leaf_of_item: np.ndarray) -> str | None:
    """SHA-256 (hex) of which items share a leaf int [I] of a trie, however numbered; None: none do.

    Titles are ranked by leaf, so that it matters whose trie it is.
    """
    _, first, number_I = np.unique(leaf_of_item, return_index=True, return_inverse=True)
    if len(first) == len(number_I):
        return None
    return hashlib.sha256(first[number_I].astype(np.int32).tobytes()).hexdigest()
