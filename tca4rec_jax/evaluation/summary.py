"""What results.json and results.md hold of an evaluation of rankings.

Axis letters: R rows.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import Comparison
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval, bootstrap_intervals
from tca4rec_jax.metrics import metric_differences, ranking_metrics
from tca4rec_jax.reporting import Cell, show_table, write_results


def check_cutoffs(config: ConfigDict) -> None:
    """Raises UserError for a K beyond the lists of the LLMs: CF models alone would reach it."""
    longest, beams = config.evaluation.cutoffs[-1], config.decoding.beams
    if longest > beams:
        raise UserError(
            f"evaluation.cutoffs has {longest}, but a list of an LLM has decoding.beams={beams} "
            f"titles: give --config.decoding.beams={longest}, or cutoffs up to {beams}"
        )


def headline(config: ConfigDict) -> tuple[str, str]:
    """The two metrics that are drawn and compared: HR and NDCG at the largest K."""
    k = config.evaluation.cutoffs[-1]
    return f"hr@{k}", f"ndcg@{k}"


def summarise(
    experiment: Experiment,
    rows: EvaluationRows,
    rankings: Mapping[str, ModelRanking],
    compared: Comparison,
) -> dict:
    """Everything that results.json holds but its provenance; metrics are intervals over the rows.

    `runs` has the step of the checkpoint that was taken of each run.
    """
    config, sequences = experiment.config, rows.sequences
    return {
        "rows": len(rows),
        "users": len(np.unique(sequences.user)),
        "tied_rows": int(sequences.tied.sum()),
        "split": config.evaluation.split,
        "items": config.evaluation.candidates or experiment.data.catalogue.num_items,
        "runs": {name: experiment.run_step(name) for name in compared.guidances if name},
        "models": {label: _model_metrics(config, rows, one) for label, one in rankings.items()},
        "differences": {
            f"{a} - {b}": differences(config, rankings[a], rankings[b], sequences.user)
            for a, b in compared.differences
        },
        "config": json.loads(config.to_json_best_effort()),
    }


def _model_metrics(config: ConfigDict, rows: EvaluationRows, ranking: ModelRanking) -> dict:
    """Metrics by item, by title, over the rows with and without tied timestamps, and the NLL."""
    user_R, tied_R, seed = rows.sequences.user, rows.sequences.tied, config.evaluation.seed
    cutoffs = config.evaluation.cutoffs
    metrics = {
        "by item": ranking_metrics(ranking.rank_R, user_R, cutoffs, seed=seed),
        "by title": ranking_metrics(ranking.title_rank_R, user_R, cutoffs, seed=seed),
    }
    for part, chosen_R in (("tied", tied_R), ("untied", ~tied_R)):
        if chosen_R.any() and not chosen_R.all():
            metrics[f"by item, {part} rows"] = ranking_metrics(
                ranking.rank_R[chosen_R], user_R[chosen_R], cutoffs[-1:], seed=seed
            )
    return metrics | {"nll per title": _likelihoods(config, ranking, user_R)}


def _likelihoods(config: ConfigDict, ranking: ModelRanking, user_R: np.ndarray) -> dict | None:
    """NLL per title at every temperature and at the best of them."""
    temperatures = config.evaluation.temperatures
    if (best := ranking.best_nll(temperatures)) is None:
        return None
    values = {f"temperature {t:g}": ranking.nll_RxT[:, i] for i, t in enumerate(temperatures)}
    values["best"] = best[1]
    found = bootstrap_intervals(values, user_R, seed=config.evaluation.seed)
    return found | {"best temperature": best[0]}


def differences(
    config: ConfigDict, model: ModelRanking, baseline: ModelRanking, user_R: np.ndarray
) -> dict[str, Interval]:
    """Paired differences (model - baseline) of the `headline`, and of NLL if both have one.

    An interval that contains 0 does not establish a difference.
    """
    temperatures, k = config.evaluation.temperatures, config.evaluation.cutoffs[-1]
    values = metric_differences(model.rank_R, baseline.rank_R, k)
    model_best, baseline_best = model.best_nll(temperatures), baseline.best_nll(temperatures)
    if model_best and baseline_best:
        values["nll per title"] = model_best[1] - baseline_best[1]
    return bootstrap_intervals(values, user_R, seed=config.evaluation.seed)


def write_tables(folder: Path, results: dict, config: ConfigDict) -> None:
    """Prints the tables; writes results.json and results.md."""
    title = (
        f"{results['rows']} {results['split']} rows, each ranked over {results['items']} items; "
        "NLL of its title at the model's best temperature"
    )
    models = {label: _cells(metrics, config) for label, metrics in results["models"].items()}
    text = show_table(models, title=title, first_column="model")
    if results["differences"]:
        hr, ndcg = headline(config)
        shown = {ndcg.upper(): ndcg, hr.upper(): hr, "NLL (lower is better)": "nll per title"}
        table = {
            label: {column: one.get(name) for column, name in shown.items()}
            for label, one in results["differences"].items()
        }
        heading = "Paired differences (95% bootstrap interval over users)"
        text += "\n" + show_table(table, title=heading, first_column="difference")
    write_results(folder / "results.json", results)
    write_text(folder / "results.md", text)


def _cells(metrics: dict, config: ConfigDict) -> dict[str, Cell]:
    """A model's row of the table."""
    cutoffs, (_, best) = config.evaluation.cutoffs, headline(config)
    shown = [f"hr@{k}" for k in cutoffs] + [f"ndcg@{k}" for k in cutoffs if k > 1]
    cells: dict[str, Cell] = {name.upper(): metrics["by item"][name].mean for name in shown}
    cells[f"{best.upper()}, 95% interval"] = metrics["by item"][best]
    cells["by title"] = metrics["by title"][best].mean
    for part in ("tied", "untied"):
        if f"by item, {part} rows" in metrics:
            cells[part] = metrics[f"by item, {part} rows"][best].mean
    if metrics["nll per title"]:
        cells["NLL"] = metrics["nll per title"]["best"].mean
    return cells
