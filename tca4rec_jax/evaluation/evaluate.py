"""The evaluation of an experiment: CF models and LLM runs on the same rows, over all items.

Written below the work directory:
  evaluation/<run>_*.npz     recommended items and ranks of each row, kept so that any other
                             statistic can be computed
  evaluation/unfinished.npz  where an interrupted evaluation goes on
  results.json, results.md, results.png, training.png, examples.md; those of an evaluation with
                             a name in results/<name>
  sweep_<run>.json, .md, .png of `sweep_guidance`

Axis letters: R rows.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation import report
from tca4rec_jax.evaluation.answers import evaluate_answers
from tca4rec_jax.evaluation.comparison import (
    COMMAND,
    UNTRAINED,
    Comparison,
    check_same_comparison,
    comparison,
    inputs_of,
    results_folder,
)
from tca4rec_jax.evaluation.llm_rankings import rank_llms
from tca4rec_jax.evaluation.rankings import (
    CF,
    POPULAR,
    EvaluationRows,
    ModelRanking,
    rank_cf_models,
)
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines, write_text
from tca4rec_jax.metrics import Interval, bootstrap_intervals, paired_differences, ranking_metrics
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.reporting import Cell, show, show_table, write_results

SHOWN = ("hr@1", "hr@3", "hr@5", "hr@10", "ndcg@3", "ndcg@5", "ndcg@10")
DRAWN = ("hr@10", "ndcg@10")


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
    return evaluate[experiment.recipe.evaluated_by](experiment, rows, compared, made_from, folder)


def _evaluate_rankings(
    experiment: Experiment,
    rows: EvaluationRows,
    compared: Comparison,
    made_from: Provenance,
    folder: Path,
) -> dict:
    """`evaluate_run` of lists: ranks of the rows' targets."""
    rankings = rank_cf_models(experiment, rows) | rank_llms(experiment, rows, compared.guidances)
    rankings = {label: rankings[label] for label in compared.labels}
    results = summarise(experiment, rows, rankings, compared)
    results["provenance"] = dataclasses.asdict(made_from)
    if is_main_process():
        _write_tables(folder, results)
        curves = {
            run: read_json_lines(experiment.workdir / "llm" / run / "log.jsonl")
            for run in results["runs"]
        }
        _plot(folder, results, curves)
        _write_examples(folder, experiment, rows, rankings)
    return results


def sweep_guidance(
    config: ConfigDict, workdir: Path, run: str, guidances: Sequence[float], *, name: str = ""
) -> dict:
    """Ranks the rows with one LLM run at several weights of the CF model; writes the reports.

    score = log P_LLM + lambda * log p_cf: at lambda = 0, always among the guidances (none may be
    negative), the LLM ranks, for large lambda the CF model. Prompts run once for all of them.
    `run` is below workdir/llm, '' the pretrained LLM. Returns {'rows', 'step' (of the checkpoint),
    'models': {label: metrics}, 'differences': {label: ..}, 'provenance'}, as in sweep_<run>.json.
    `name` and what is raised are as in `evaluate_run`.
    """
    experiment = Experiment(config, workdir)
    if (kind := experiment.recipe.evaluated_by) != "rankings":
        raise UserError(
            f"recommender.name is {config.recommender.name!r}, which ranks nothing: {COMMAND} "
            f"--guidance=0,1 compares its {kind}"
        )
    if run:
        experiment.check_run(run, guided=any(guidances))
    rows, shown = EvaluationRows.of(experiment), run or UNTRAINED
    labels = {f"lambda = {value:g}": value for value in sorted({0.0, *map(float, guidances)})}
    compared = Comparison(tuple((label, run, value) for label, value in labels.items()), ())
    made_from = Provenance("sweep", COMMAND, inputs_of(experiment, rows, compared))
    path = results_folder(workdir, name) / f"sweep_{shown}.json"
    if not name:
        check_same_comparison(path, made_from)
    cf_ranking = rank_cf_models(experiment, rows)[CF]
    rankings = rank_llms(experiment, rows, compared.guidances) | {CF: cf_ranking}

    def gain(label: str, other: str) -> Interval:
        ranks = rankings[label].rank_R, rankings[other].rank_R
        return paired_differences(*ranks, seed=config.evaluation.seed)["ndcg@10"]

    models = {
        label: ranking_metrics(one.rank_R, seed=config.evaluation.seed)
        for label, one in rankings.items()
    }
    differences = {
        label: {f"NDCG@10 - {other}": gain(label, other) for other in ("lambda = 0", CF)}
        for label in labels
    }
    results = {
        "rows": len(rows),
        "step": experiment.run_step(run) if run else 0,
        "models": models,
        "differences": differences,
        "provenance": dataclasses.asdict(made_from),
    }
    if is_main_process():
        title = f"{shown}: {len(rows)} {config.evaluation.split} rows, 95% bootstrap intervals"
        table = {
            label: {metric.upper(): one[metric] for metric in DRAWN} | differences.get(label, {})
            for label, one in models.items()
        }
        text = show_table(table, title=title, first_column="score")
        write_text(path.with_suffix(".md"), text)
        write_results(path, results)
        curve = {guidance: models[label] for label, guidance in labels.items()}
        report.plot_sweep(path.with_suffix(".png"), curve, DRAWN, baseline=(CF, models[CF]))
    return results


def summarise(
    experiment: Experiment,
    rows: EvaluationRows,
    rankings: Mapping[str, ModelRanking],
    compared: Comparison,
) -> dict:
    """Everything that results.json holds but its provenance; metrics are intervals over the rows.

    `runs` has the step of the checkpoint that was taken of each run.
    """
    config, tied_R = experiment.config, rows.sequences.tied
    return {
        "rows": len(rows),
        "tied_rows": int(tied_R.sum()),
        "split": config.evaluation.split,
        "items": config.evaluation.candidates or experiment.data.catalogue.num_items,
        "runs": {name: experiment.run_step(name) for name in compared.guidances if name},
        "models": {label: _model_metrics(config, one, tied_R) for label, one in rankings.items()},
        "differences": {
            f"{a} - {b}": _difference(config, rankings[a], rankings[b])
            for a, b in compared.differences
        },
        "config": json.loads(config.to_json_best_effort()),
    }


def _model_metrics(config: ConfigDict, ranking: ModelRanking, tied_R: np.ndarray) -> dict:
    """Metrics by item, by title, over the rows with and without tied timestamps, and the NLL."""
    metrics = {
        "by item": ranking_metrics(ranking.rank_R, seed=config.evaluation.seed),
        "by title": ranking_metrics(ranking.title_rank_R, seed=config.evaluation.seed),
    }
    for part, chosen_R in (("tied", tied_R), ("untied", ~tied_R)):
        if chosen_R.any() and not chosen_R.all():
            part_ranks = ranking.rank_R[chosen_R]
            metrics[f"by item, {part} rows"] = ranking_metrics(
                part_ranks, (10,), seed=config.evaluation.seed
            )
    return metrics | {"nll per title": _likelihoods(config, ranking)}


def _likelihoods(config: ConfigDict, ranking: ModelRanking) -> dict | None:
    """NLL per title at every temperature and at the best of them."""
    temperatures = config.evaluation.temperatures
    if (best := ranking.best_nll(temperatures)) is None:
        return None
    values = {f"temperature {t:g}": ranking.nll_RxT[:, i] for i, t in enumerate(temperatures)}
    values["best"] = best[1]
    return bootstrap_intervals(values, seed=config.evaluation.seed) | {"best temperature": best[0]}


def _difference(config: ConfigDict, model: ModelRanking, baseline: ModelRanking) -> dict:
    """Paired differences (model - baseline) of metrics, and of NLL if both have one."""
    differences = paired_differences(model.rank_R, baseline.rank_R, seed=config.evaluation.seed)
    temperatures = config.evaluation.temperatures
    model_best, baseline_best = model.best_nll(temperatures), baseline.best_nll(temperatures)
    if model_best and baseline_best:
        nll = {"nll per title": model_best[1] - baseline_best[1]}
        differences |= bootstrap_intervals(nll, seed=config.evaluation.seed)
    return differences


def _write_tables(folder: Path, results: dict) -> None:
    """Prints the tables; writes results.json and results.md."""
    title = (
        f"{results['rows']} {results['split']} rows, each ranked over {results['items']} items; "
        "NLL of its title at the model's best temperature"
    )
    models = {label: _model_cells(metrics) for label, metrics in results["models"].items()}
    text = show_table(models, title=title, first_column="model")
    if results["differences"]:
        shown = {"NDCG@10": "ndcg@10", "HR@10": "hr@10", "NLL (lower is better)": "nll per title"}
        differences = {
            label: {column: one.get(name) for column, name in shown.items()}
            for label, one in results["differences"].items()
        }
        heading = "Paired differences (95% bootstrap interval)"
        text += "\n" + show_table(differences, title=heading, first_column="difference")
    write_results(folder / "results.json", results)
    write_text(folder / "results.md", text)


def _model_cells(metrics: dict) -> dict[str, Cell]:
    """A model's row of the table."""
    cells: dict[str, Cell] = {name.upper(): metrics["by item"][name].mean for name in SHOWN}
    cells["NDCG@10, 95% interval"] = metrics["by item"]["ndcg@10"]
    cells["by title"] = metrics["by title"]["ndcg@10"].mean
    for part in ("tied", "untied"):
        if f"by item, {part} rows" in metrics:
            cells[part] = metrics[f"by item, {part} rows"]["ndcg@10"].mean
    if metrics["nll per title"]:
        cells["NLL"] = metrics["nll per title"]["best"].mean
    return cells


def _plot(folder: Path, results: dict, curves: Mapping[str, list[dict]]) -> None:
    """Draws results.png, and training.png if there is a training log."""
    by_item = {label: metrics["by item"] for label, metrics in results["models"].items()}
    report.plot_metrics(folder / "results.png", by_item, DRAWN)
    if any(curves.values()):
        keys = ("loss", "nll_per_title", "grad_norm")
        report.plot_training_curves(folder / "training.png", curves, keys)


def _write_examples(
    folder: Path,
    experiment: Experiment,
    rows: EvaluationRows,
    rankings: Mapping[str, ModelRanking],
) -> None:
    """Prints and writes examples.md: what every model but the most popular recommends to some."""
    config = experiment.config
    order_R = np.random.default_rng(config.evaluation.seed).permutation(len(rows))
    examples = report.examples_text(
        experiment.data.catalogue.titles,
        rows.history_RxH,
        {label: one.items_RxM for label, one in rankings.items() if label != POPULAR},
        rows.target_R,
        order_R[: config.evaluation.examples].tolist(),
    )
    write_text(folder / "examples.md", examples)
    files = "results.json, results.md, results.png, training.png, examples.md"
    show(*examples.split("\n"), f"Written to {folder}: {files}")
