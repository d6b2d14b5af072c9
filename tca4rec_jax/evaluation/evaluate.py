"""The evaluation of an experiment: CF models and LLM runs on the same rows, over all items.

Written below the work directory:
  evaluation/<run>_*.npz     recommended items and ranks of each row, kept so that any other
                             statistic can be computed
  evaluation/unfinished_*.npz  where an interrupted evaluation goes on
  rankings.npz, results.json, results.md, results.png, details.md, slices.png, training.png,
  examples.md, report.html   those of an evaluation with a name in results/<name>; the first has the
                             ranks of every model of the table, for launch/compare.py, the last is
                             all of it for people, in one file
  tensorboard/               metrics and table for TensorBoard (trackers.py), beside results.json
  sweep_<run>.json, .md, .png of `sweep_guidance`

Axis letters: R rows.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.answers import evaluate_answers
from tca4rec_jax.evaluation.calibration import calibrations
from tca4rec_jax.evaluation.comparison import (
    COMMAND,
    UNTRAINED,
    Comparison,
    check_same_comparison,
    comparison,
    inputs_of,
    results_folder,
)
from tca4rec_jax.evaluation.details import write_details
from tca4rec_jax.evaluation.kept_rankings import KeptRankings, hit_ranks
from tca4rec_jax.evaluation.lists import ListMetrics
from tca4rec_jax.evaluation.llm_rankings import rank_llms
from tca4rec_jax.evaluation.page import FILE, write_page
from tca4rec_jax.evaluation.page_rows import RankedRows
from tca4rec_jax.evaluation.pictures import metrics_figure, sweep_figure, training_figure
from tca4rec_jax.evaluation.rankings import (
    CF,
    POPULAR,
    EvaluationRows,
    ModelRanking,
    cf_models,
    rank_cf_models,
)
from tca4rec_jax.evaluation.report import examples_text
from tca4rec_jax.evaluation.summary import (
    check_cutoffs,
    differences,
    headline,
    intervals,
    ranked_items,
    summarise,
    write_tables,
)
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines, write_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.metrics import metric_values
from tca4rec_jax.provenance import Provenance, flatten
from tca4rec_jax.reporting import save_figure, show, show_table, write_results
from tca4rec_jax.trackers import Trackers

_FILES = (
    "rankings.npz, results.json, .md and .png, details.md, slices.png, training.png, examples.md"
)


def evaluate_run(
    config: ConfigDict,
    workdir: Path,
    *,
    runs: Sequence[str] = (),
    guidances: Sequence[float] = (),
    name: str = "",
) -> dict:
    """Evaluates what `comparison` says and writes the reports; returns results.json.

    They are written to the work directory, or with a `name` to results/<name> in it. Several
    processes share the rows; every one of them gets the results, the first writes them.

    Raises FileNotFoundError if a part of the work directory is missing, UserError for inputs that
    do not fit; before any work as `comparison`, and UserError if no name is given and the reports
    there are of another comparison.
    """
    experiment = Experiment(config, workdir)
    compared = comparison(experiment, runs, guidances)
    rows = EvaluationRows.of(experiment)
    made_from = Provenance("evaluation", COMMAND, inputs_of(experiment, rows, compared))
    folder = results_folder(workdir, name)
    if not name:
        check_same_comparison(folder / "results.json", made_from)
    logging.info("Evaluating %d of the %s rows", len(rows), config.evaluation.split)
    evaluate = {"rankings": _evaluate_rankings, "answers": evaluate_answers}
    results = evaluate[experiment.recipe.evaluated_by](
        experiment, rows, compared, made_from, folder
    )
    with Trackers.open(config, folder, made_from, made_from.fingerprint) as trackers:
        numbers = {
            name: value.mean if isinstance(value, Interval) else value
            for name, value in flatten(results["models"])
            if isinstance(value, Interval | float)
        }
        trackers.scalars(0, numbers)
        if is_main_process():
            trackers.text("results", (folder / "results.md").read_text("utf-8"))
    return results


def _evaluate_rankings(
    experiment: Experiment,
    rows: EvaluationRows,
    compared: Comparison,
    made_from: Provenance,
    folder: Path,
) -> dict:
    """`evaluate_run` of lists: ranks of the rows' targets; raises as `check_cutoffs`."""
    check_cutoffs(experiment.config)
    models = cf_models(experiment, rows)
    rankings = rank_cf_models(experiment, rows, models)
    rankings |= rank_llms(experiment, rows, compared.guidances)
    rankings = {label: rankings[label] for label in compared.labels}
    lists = None  # of candidates, lists are as those were drawn
    if rows.candidates_RxN is None:
        lists = ListMetrics.of(experiment, rows, models[CF][1].table_IxD)
    calibrated = calibrations(experiment, rows, models)
    results = summarise(experiment, rows, rankings, compared, lists, calibrated)
    results["provenance"] = dataclasses.asdict(made_from)
    if is_main_process():
        kept = rows, rankings, experiment.config.evaluation.temperatures
        KeptRankings.of(folder, made_from, *kept).write()
        write_tables(folder, results, experiment.config)
        write_details(folder, results, headline(experiment.config)[1])
        _plot(folder, results, experiment)
        order_R = np.random.default_rng(experiment.config.evaluation.seed).permutation(len(rows))
        shown = order_R[: experiment.config.evaluation.examples].tolist()
        _write_examples(folder, experiment, rows, rankings, shown)
        ranked = RankedRows(
            experiment.data.catalogue.titles,
            rows,
            rankings,
            results["hits"],
            experiment.config.evaluation.temperatures,
        )
        write_page(folder, experiment, results, ranked, shown)
        show(f"Written to {folder}: {_FILES}", f"The report: {folder / FILE}")
    return results


def sweep_guidance(
    config: ConfigDict, workdir: Path, run: str, guidances: Sequence[float], *, name: str = ""
) -> dict:
    """Ranks the rows with one LLM run at several weights of the CF model; writes the reports.

    score = log P_LLM + lambda * log p_cf: at lambda = 0, always among the guidances (none may be
    negative), the LLM ranks, for large lambda the CF model. Prompts run once for all of them.
    `run` is below workdir/llm, '' the pretrained LLM. Returns what sweep_<run>.json holds: {'rows',
    'ranked', 'step' (of the checkpoint), 'models': {label: metrics}, 'differences', 'provenance'}.
    `name` and what is raised are as in `evaluate_run`.
    """
    experiment = Experiment(config, workdir)
    if (kind := experiment.recipe.evaluated_by) != "rankings":
        raise UserError(
            f"recommender.name is {config.recommender.name!r}, which ranks nothing: {COMMAND} "
            f"--guidance=0,1 compares its {kind}"
        )
    check_cutoffs(config)
    if run:
        experiment.check_run(run, guided=any(guidances))
    rows, shown = EvaluationRows.of(experiment), run or UNTRAINED
    labels = {f"lambda = {value:g}": value for value in sorted({0.0, *map(float, guidances)})}
    compared = Comparison(tuple((label, run, value) for label, value in labels.items()), ())
    made_from = Provenance("sweep", COMMAND, inputs_of(experiment, rows, compared))
    path = results_folder(workdir, name) / f"sweep_{shown}.json"
    if not name:
        check_same_comparison(path, made_from)
    cf_ranking = rank_cf_models(experiment, rows, cf_models(experiment, rows))[CF]
    rankings = rank_llms(experiment, rows, compared.guidances) | {CF: cf_ranking}

    columns: dict[str, Mapping[str, np.ndarray]] = {
        label: metric_values(hit_ranks(one, config.evaluation.hits), config.evaluation.cutoffs)
        for label, one in rankings.items()
    }
    pairs = {label: [(label, "lambda = 0"), (label, CF)] for label in labels}
    columns |= differences(config, rankings, itertools.chain(*pairs.values()))
    found, drawn = intervals(config, columns, rows.sequences.user), headline(config)
    results = {
        "rows": len(rows),
        "ranked": ranked_items(experiment),
        "step": experiment.run_step(run) if run else 0,
        "models": {label: found[label] for label in rankings},
        "differences": {
            label: {f"{drawn[1].upper()} - {b}": found[f"{a} - {b}"][drawn[1]] for a, b in of_label}
            for label, of_label in pairs.items()
        },
        "provenance": dataclasses.asdict(made_from),
    }
    if is_main_process():
        title = f"{shown}: {len(rows)} {config.evaluation.split} rows"
        _write_sweep(path, title, results, labels, drawn)
    return results


def _write_sweep(
    path: Path, title: str, results: dict, labels: Mapping[str, float], drawn: Sequence[str]
) -> None:
    """Prints the table; writes sweep_<run>.json, .md and .png. `labels` are {label: guidance}."""
    models, gains = results["models"], results["differences"]
    title += f", each ranked over {results['ranked']}, 95% bootstrap intervals over users"
    table = {
        label: {metric.upper(): one[metric] for metric in drawn} | gains.get(label, {})
        for label, one in models.items()
    }
    write_text(path.with_suffix(".md"), show_table(table, title=title, first_column="score"))
    write_results(path, results)
    curve = {guidance: models[label] for label, guidance in labels.items()}
    figure = sweep_figure(curve, drawn, baseline=(CF, models[CF]))
    save_figure(path.with_suffix(".png"), figure)


def _plot(folder: Path, results: dict, experiment: Experiment) -> None:
    """Draws results.png, and training.png if there is a training log."""
    hits = f"by {results['hits']}"
    models = {label: metrics[hits] for label, metrics in results["models"].items()}
    save_figure(folder / "results.png", metrics_figure(models, headline(experiment.config)))
    runs = {name: experiment.runs[name] for name in results["runs"]}
    curves = {name: read_json_lines(run.log) for name, run in runs.items()}
    if any(curves.values()):
        keys = list(dict.fromkeys(key for run in runs.values() for key in run.drawn))
        save_figure(folder / "training.png", training_figure(curves, keys))


def _write_examples(
    folder: Path,
    experiment: Experiment,
    rows: EvaluationRows,
    rankings: Mapping[str, ModelRanking],
    shown: Sequence[int],
) -> None:
    """Writes examples.md: what every model but the most popular recommends to some; logs one."""
    examples = examples_text(
        experiment.data.catalogue.titles,
        rows.history_RxH,
        {label: one.items_RxM for label, one in rankings.items() if label != POPULAR},
        rows.target_R,
        shown,
    )
    write_text(folder / "examples.md", examples)
    logging.info("%s", examples.partition("\n### Example 2 ")[0])
