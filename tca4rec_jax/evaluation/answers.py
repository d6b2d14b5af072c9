"""The evaluation of recommenders that answer Yes or No: AUC over rows, and within users.

Axis letters: R rows, B rows of a batch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import DENSE
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.questions import YES, question_rows
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.decoding.beam_search import ScoreWeights
from tca4rec_jax.decoding.candidate_questions import log_odds
from tca4rec_jax.decoding.engine import SearchRows
from tca4rec_jax.decoding.results import Recommendations, ResultsFile
from tca4rec_jax.distributed import multihost
from tca4rec_jax.evaluation import page
from tca4rec_jax.evaluation.comparison import Comparison
from tca4rec_jax.evaluation.llm_rankings import jobs_of, kept_results
from tca4rec_jax.evaluation.rankings import CF, POPULAR, EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval, bootstrap_intervals
from tca4rec_jax.metrics import answer_metrics
from tca4rec_jax.pages.blocks import Numbers, Section, Text
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.recommenders.answer import AnswerLogits, Questions
from tca4rec_jax.recommenders.vectors import soft_rows
from tca4rec_jax.reporting import Cell, Rows, show_table, write_results


def evaluate_answers(
    experiment: Experiment,
    rows: EvaluationRows,
    compared: Comparison,
    made_from: Provenance,
    folder: Path,
) -> dict:
    """`evaluate_run` of answers: AUC in the place of ranks, in results.json and results.md.

    'auc' is over all rows, 'uauc' the mean over users who have both answers, each also over the
    warm rows (user and item are in the training rows) and the cold ones; intervals resample users.
    """
    config, catalogue = experiment.config, experiment.data.catalogue
    split = config.evaluation.split
    store = experiment.cf_store(split, rows.position_R)
    teacher = experiment.recipe.teacher(experiment, split, store)
    assert isinstance(teacher, AnswerLogits)
    questions = teacher.questions
    row_R = np.searchsorted(questions.position_R, rows.position_R)
    popular_I = popularity_logits(experiment.data.splits["train_sequences"], catalogue.num_items)
    scores = {
        POPULAR: popular_I[questions.asked.item_R[row_R]],
        CF: teacher.read(questions.position_R[row_R])[:, YES],
        **_llm_scores(experiment, rows, questions, row_R, teacher, compared),
    }
    yes_R, user_R = questions.asked.answer_R[row_R] == YES, questions.sequences.user[row_R]
    parts, seed = _parts(experiment, questions, row_R), config.evaluation.seed

    def metrics(label: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            part: answer_metrics(
                scores[label][inside_R], yes_R[inside_R], user_R[inside_R], seed=seed
            )
            for part, inside_R in parts.items()
        }
        nll = None if label == POPULAR else _nll(scores[label], yes_R, user_R, seed)
        return found | {"nll": nll}

    def difference(label: str, other: str) -> dict[str, Interval]:
        given = {"baseline_R": scores[other], "seed": seed}
        return answer_metrics(scores[label], yes_R, user_R, **given)

    results = {
        "rows": len(row_R),
        "yes": int(yes_R.sum()),
        "part_rows": {part: int(inside_R.sum()) for part, inside_R in parts.items()},
        "split": split,
        "items": catalogue.num_items,
        "runs": {run: experiment.run_step(run) for run in compared.guidances if run},
        "models": {label: metrics(label) for label in compared.labels},
        "differences": {f"{a} - {b}": difference(a, b) for a, b in compared.differences},
        "config": json.loads(config.to_json_best_effort()),
        "provenance": dataclasses.asdict(made_from),
    }
    if multihost.is_main_process():
        _write_tables(folder, results)
        lead = f"Whose answers are yes: {results['yes']}. Intervals are of 95%, users drawn."
        accuracy = Section("Accuracy", [Numbers(_table(results), "model"), *_differences(results)])
        title = f"{results['rows']} {split} rows: Yes or No"
        page.write(folder, experiment, results, title, [Text(lead)], [accuracy])
    return results


def _nll(score_R: np.ndarray, yes_R: np.ndarray, user_R: np.ndarray, seed: int) -> Interval:
    """-log P(answer), in nats, of scores log P(yes) - log P(no)."""
    nll_R = np.logaddexp(0.0, np.where(yes_R, -score_R, score_R))
    return bootstrap_intervals({"nll": nll_R}, user_R, seed=seed)["nll"]


def _write_tables(folder: Path, results: dict) -> None:
    """Prints the tables; writes results.json and results.md."""
    counts = ", ".join(f"{count} {part}" for part, count in results["part_rows"].items())
    title = f"{results['split']} rows: {counts}; {results['yes']} answers are yes"
    text = show_table(_table(results), title=title, first_column="model")
    for table in _differences(results):
        heading, first_column = table.caption, table.first_column
        text += "\n" + show_table(table.rows, title=heading, first_column=first_column)
    write_text(folder / "results.md", text)
    write_results(folder / "results.json", results)


def _table(results: Mapping) -> Rows:
    return {label: _cells(metrics) for label, metrics in results["models"].items()}


def _differences(results: Mapping) -> list[Numbers]:
    """The table of paired differences, if there are any."""
    cells = {
        label: {name.upper(): one.get(name) for name in ("auc", "uauc")}
        for label, one in results["differences"].items()
    }
    heading = "Paired differences (95% interval over users)"
    return [Numbers(cells, "difference", heading)] if cells else []


def _llm_scores(
    experiment: Experiment,
    rows: EvaluationRows,
    questions: Questions,
    row_R: np.ndarray,
    teacher: AnswerLogits,
    compared: Comparison,
) -> dict[str, np.ndarray]:
    """log P(yes) - log P(no) of each row by the LLM runs, by label."""
    template = build(PromptTemplate, experiment.config.prompt)
    asked = questions.asked.take(row_R)
    prompts: Prompts = question_rows(experiment.items, asked, template, with_answers=False).prompts
    position_R, store = questions.position_R[row_R], teacher.store
    searched = SearchRows(
        prompts.tokens,
        cf=lambda rows_B: teacher.read(position_R[rows_B]),
        cf_items=DENSE,
        soft=soft_rows(
            experiment, prompts, lambda rows_B: store.read(position_R[rows_B]), store.cf_items
        ),
    )
    yes_leaf = experiment.trie.leaf_of_item[YES]

    def search(weights: Mapping[str, list[ScoreWeights]], file: ResultsFile | None):
        jobs, progress = jobs_of(experiment, weights)
        prefix = experiment.frozen_prefix
        results = experiment.search(2).sweep(
            jobs, searched, frozen_prefix=prefix, progress=progress, file=file
        )
        return [[_AnswerScores.of(found, yes_leaf) for found in of_run] for of_run in results]

    inputs = {
        "items asked about": hashlib.sha256(asked.item_R.tobytes()).hexdigest(),
        "calibration": [teacher.slope, teacher.offset],
    }
    given = experiment, rows, compared.guidances, _AnswerScores, search, inputs
    return {label: found.score_R for label, found in kept_results(*given).items()}


class _AnswerScores(NamedTuple):
    """What one LLM says to the rows: log P(yes) - log P(no), float32."""

    score_R: np.ndarray

    @classmethod
    def of(cls, found: Recommendations, yes_leaf: int) -> "_AnswerScores":
        """Of a search among the two answers."""
        return cls(log_odds(found, yes_leaf))


def _parts(
    experiment: Experiment, questions: Questions, row_R: np.ndarray
) -> dict[str, np.ndarray]:
    """{part: bool [R]}: all rows, the warm and the cold ones."""
    trained = experiment.data.splits["train_sequences"]
    warm_R = np.isin(questions.sequences.user[row_R], trained.user)
    warm_R &= np.isin(questions.asked.item_R[row_R], trained.items)
    return {"all": np.ones(len(row_R), bool), "warm": warm_R, "cold": ~warm_R}


def _cells(metrics: Mapping[str, Any]) -> dict[str, Cell]:
    """A model's row of the table."""
    cells: dict[str, Cell] = {name.upper(): metrics["all"].get(name) for name in ("auc", "uauc")}
    for part in ("warm", "cold"):
        for name in ("auc", "uauc"):
            if name in metrics[part]:
                cells[f"{name.upper()}, {part}"] = metrics[part][name].mean
    return cells | {"NLL": metrics["nll"] and metrics["nll"].mean}
