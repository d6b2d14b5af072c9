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
from tca4rec_jax.evaluation.lists import ListMetrics
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.evaluation.slices import slices
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval, bootstrap_intervals
from tca4rec_jax.metrics import metric_differences, metric_values, ranking_metrics
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
    lists: ListMetrics,
    calibrations: Mapping[str, Mapping[str, float]],
) -> dict:
    """Everything that results.json holds but its provenance; metrics are intervals over the rows.

    `runs` has the step of the checkpoint that was taken of each run, `filters` what holds for every
    model, `slices` the number of rows of each.
    """
    config, user_R = experiment.config, rows.sequences.user
    train, items = experiment.data.splits["train_sequences"], experiment.data.catalogue.num_items
    inside = slices(rows.sequences, lists.histories, train, items)
    models = {label: _model_metrics(config, user_R, one) for label, one in rankings.items()}
    for label, metrics in models.items():
        metrics["lists"] = _list_metrics(config, user_R, rankings[label], lists)
        metrics["slices"] = _slice_metrics(config, user_R, rankings[label], inside)
        metrics["calibration"] = calibrations.get(label)
    return {
        "rows": len(rows),
        "users": len(np.unique(user_R)),
        "split": config.evaluation.split,
        "items": config.evaluation.candidates or items,
        "filters": {
            "allowed items": int(experiment.item_filter.allowed_I.sum()),
            "exclude history": bool(experiment.item_filter.exclude_history),
        },
        "hits": config.evaluation.hits,
        "slices": {name: int(inside_R.sum()) for name, inside_R in inside.items()},
        "runs": {name: experiment.run_step(name) for name in compared.guidances if name},
        "models": models,
        "differences": {
            f"{a} - {b}": differences(config, rankings[a], rankings[b], user_R)
            for a, b in compared.differences
        },
        "config": json.loads(config.to_json_best_effort()),
    }


def _model_metrics(config: ConfigDict, user_R: np.ndarray, ranking: ModelRanking) -> dict:
    """Metrics by item and by title, and the NLL."""
    evaluation = config.evaluation
    return {
        by: ranking_metrics(rank_R, user_R, evaluation.cutoffs, seed=evaluation.seed)
        for by, rank_R in (("by item", ranking.rank_R), ("by title", ranking.title_rank_R))
    } | {"nll per title": _likelihoods(config, ranking, user_R)}


def _list_metrics(
    config: ConfigDict, user_R: np.ndarray, ranking: ModelRanking, lists: ListMetrics
) -> dict[str, Interval | float]:
    """Those of `ListMetrics`: means with intervals, and values of all lists together."""
    given = ranking.items_RxM, config.evaluation.cutoffs
    means = bootstrap_intervals(lists.of_rows(*given), user_R, seed=config.evaluation.seed)
    return {**means, **lists.of_all(*given)}


def _slice_metrics(
    config: ConfigDict, user_R: np.ndarray, ranking: ModelRanking, inside: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Interval]]:
    """The `headline` of every slice (bool [R])."""
    values = metric_values(hit_ranks(config, ranking), config.evaluation.cutoffs[-1:])
    columns = {
        (name, metric): np.ma.masked_array(values[metric], ~inside_R)
        for name, inside_R in inside.items()
        for metric in headline(config)
    }
    if not columns:
        return {}
    found = bootstrap_intervals(columns, user_R, seed=config.evaluation.seed)
    return {name: {m: found[name, m] for m in headline(config)} for name in inside}


def hit_ranks(config: ConfigDict, ranking: ModelRanking) -> np.ndarray:
    """int [R]: the ranks that count, by config.evaluation.hits."""
    return ranking.rank_R if config.evaluation.hits == "item" else ranking.title_rank_R


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
    values = metric_differences(hit_ranks(config, model), hit_ranks(config, baseline), k)
    model_best, baseline_best = model.best_nll(temperatures), baseline.best_nll(temperatures)
    if model_best and baseline_best:
        values["nll per title"] = model_best[1] - baseline_best[1]
    return bootstrap_intervals(values, user_R, seed=config.evaluation.seed)


def write_tables(folder: Path, results: dict, config: ConfigDict) -> None:
    """Prints the tables; writes results.json and results.md."""
    title = (
        f"{results['rows']} {results['split']} rows, each ranked over {_ranked_items(results)}; "
        "NLL of its title at the model's best temperature"
    )
    models = {label: table_cells(metrics, config) for label, metrics in results["models"].items()}
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


def _ranked_items(results: dict) -> str:
    """Which items every model of the table ranks for a row, and what a hit is."""
    items, allowed = results["items"], results["filters"]["allowed items"]
    candidates = results["config"]["evaluation"]["candidates"]
    words = f"{items if candidates else min(items, allowed)} items"
    words += " that were drawn for it" * bool(candidates)
    words += " on the allow- and deny-lists" * (not candidates and allowed < items)
    words += " but those of its history" * results["filters"]["exclude history"]
    return words + ", hits by title" * (results["hits"] == "title")


def table_cells(metrics: dict, config: ConfigDict) -> dict[str, Cell]:
    """A model's row of the table."""
    cutoffs, (_, best) = config.evaluation.cutoffs, headline(config)
    shown = [f"hr@{k}" for k in cutoffs] + [f"ndcg@{k}" for k in cutoffs if k > 1]
    by, other = ("item", "title") if config.evaluation.hits == "item" else ("title", "item")
    cells: dict[str, Cell] = {name.upper(): metrics[f"by {by}"][name].mean for name in shown}
    cells[f"{best.upper()}, 95% interval"] = metrics[f"by {by}"][best]
    cells[f"by {other}"] = metrics[f"by {other}"][best].mean
    for part in ("tied", "untied"):
        if part in metrics["slices"]:
            cells[part] = metrics["slices"][part][best].mean
    if metrics["nll per title"]:
        cells["NLL"] = metrics["nll per title"]["best"].mean
    return cells
