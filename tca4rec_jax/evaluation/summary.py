"""What results.json and results.md hold of an evaluation of rankings.

Axis letters: R rows.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL, Comparison
from tca4rec_jax.evaluation.kept_rankings import Ranks, hit_ranks
from tca4rec_jax.evaluation.lists import ListMetrics
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.evaluation.slices import slices
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval, Name, bootstrap_intervals
from tca4rec_jax.metrics import metric_values
from tca4rec_jax.reporting import Cell, show_table, write_results


def check_cutoffs(config: ConfigDict) -> None:
    """Raises UserError for a K beyond the lists of the LLMs: CF models alone would reach it.

    And for one that all candidates reach, whatever the model.
    """
    longest, beams = config.evaluation.cutoffs[-1], config.decoding.beams
    if 0 < config.evaluation.candidates <= longest:
        raise UserError(
            f"evaluation.cutoffs has {longest}, but evaluation.candidates="
            f"{config.evaluation.candidates} are ranked: give cutoffs below that"
        )
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
    lists: ListMetrics | None,
    calibrations: Mapping[str, Mapping[str, float]],
) -> dict:
    """Everything that results.json holds but its provenance; intervals resample users.

    `runs` has the step of the checkpoint that was taken of each run, `slices` the number of rows of
    each. No `lists`: what lists are like is left out.
    """
    config, user_R = experiment.config, rows.sequences.user
    train, items = experiment.data.splits["train_sequences"], experiment.data.catalogue.num_items
    inside = slices(rows.sequences, rows.histories, train, items)
    columns = {
        (label, section): of
        for label, one in rankings.items()
        for section, of in _columns(config, one, lists, inside).items()
    }
    pairs = differences(config, rankings, compared.differences)
    columns |= {(name, "difference"): of for name, of in pairs.items()}
    found = intervals(config, columns, user_R)
    models: dict[str, dict] = {}
    for label, one in rankings.items():
        best = one.best_nll(config.evaluation.temperatures)
        all_lists = lists.of_all(one.items_RxM, config.evaluation.cutoffs) if lists else {}
        models[label] = {
            "by item": found[label, "by item"],
            "by title": found[label, "by title"],
            NLL: {**found[label, NLL], "best temperature": best[0]} if best else None,
            "lists": {**found[label, "lists"], **all_lists} if lists else None,
            "slices": {name: found[label, f"slice {name}"] for name in inside},
            "calibration": calibrations.get(label),
        }
    return {
        "rows": len(rows),
        "users": len(np.unique(user_R)),
        "split": config.evaluation.split,
        "items": config.evaluation.candidates or items,
        "ranked": ranked_items(experiment),
        "hits": config.evaluation.hits,
        "slices": {name: int(inside_R.sum()) for name, inside_R in inside.items()},
        "runs": {name: experiment.run_step(name) for name in compared.guidances if name},
        "models": models,
        "differences": {name: found[name, "difference"] for name in pairs},
        "config": json.loads(config.to_json_best_effort()),
    }


def ranked_items(experiment: Experiment) -> str:
    """In words, which items every model of a table ranks for a row."""
    allowed_I, candidates = (
        experiment.item_filter.allowed_I,
        experiment.config.evaluation.candidates,
    )
    words = f"{candidates or int(allowed_I.sum())} items"
    words += " that were drawn for it" * bool(candidates)
    words += " that may be recommended" * (not candidates and not allowed_I.all())
    return words + " but those of its history" * bool(experiment.item_filter.exclude_history)


def _columns(
    config: ConfigDict,
    ranking: ModelRanking,
    lists: ListMetrics | None,
    inside: Mapping[str, np.ndarray],
) -> dict[str, Mapping[str, np.ndarray]]:
    """{section: {metric: of every row}}: by item, by title, lists, each slice (bool [R]), NLL."""
    cutoffs, temperatures = config.evaluation.cutoffs, config.evaluation.temperatures
    headlines = metric_values(hit_ranks(ranking, config.evaluation.hits), cutoffs[-1:])
    columns: dict[str, Mapping[str, np.ndarray]] = {
        "by item": metric_values(ranking.rank_R, cutoffs),
        "by title": metric_values(ranking.title_rank_R, cutoffs),
        "lists": lists.of_rows(ranking.items_RxM, cutoffs) if lists else {},
    }
    for name, inside_R in inside.items():
        columns[f"slice {name}"] = {
            metric: np.ma.masked_array(headlines[metric], ~inside_R) for metric in headline(config)
        }
    if best := ranking.best_nll(temperatures):
        at = {f"temperature {t:g}": ranking.nll_RxT[:, i] for i, t in enumerate(temperatures)}
        columns[NLL] = at | {"best": best[1]}
    return columns


def intervals(
    config: ConfigDict, columns: Mapping[Name, Mapping[str, np.ndarray]], user_R: np.ndarray
) -> dict[Name, dict[str, Interval]]:
    """The intervals of nested columns, of one draw of users: that is what takes time."""
    flat = {(name, metric): one for name, of in columns.items() for metric, one in of.items()}
    found = bootstrap_intervals(flat, user_R, seed=config.evaluation.seed) if flat else {}
    return {name: {metric: found[name, metric] for metric in of} for name, of in columns.items()}


def differences(
    config: ConfigDict, rankings: Mapping[str, ModelRanking], pairs: Iterable[tuple[str, str]]
) -> dict[str, dict[str, np.ndarray]]:
    """{'A - B': paired differences of the `headline`, and of NLL if both have one}, of labels.

    An interval that contains 0 does not establish a difference.
    """
    evaluation = config.evaluation
    ranks = {label: Ranks.of(one, evaluation.temperatures) for label, one in rankings.items()}
    how = evaluation.cutoffs[-1:], evaluation.hits
    return {f"{a} - {b}": ranks[a].differences(ranks[b], *how) for a, b in pairs}


def write_tables(folder: Path, results: dict, config: ConfigDict) -> None:
    """Prints the tables; writes results.json and results.md."""
    title = (
        f"{results['rows']} {results['split']} rows, each ranked over {results['ranked']}"
        f"{', hits by title' * (results['hits'] == 'title')}; "
        "NLL of its title at the model's best temperature"
    )
    models = {label: table_cells(metrics, config) for label, metrics in results["models"].items()}
    text = show_table(models, title=title, first_column="model")
    if results["differences"]:
        heading = "Paired differences (95% bootstrap interval over users)"
        table = difference_cells(results, config)
        text += "\n" + show_table(table, title=heading, first_column="difference")
    write_results(folder / "results.json", results)
    write_text(folder / "results.md", text)


def difference_cells(results: Mapping, config: ConfigDict) -> dict[str, dict[str, Cell]]:
    """The table of paired differences."""
    hr, ndcg = headline(config)
    shown = {ndcg.upper(): ndcg, hr.upper(): hr, "NLL (lower is better)": NLL}
    return {
        label: {column: one.get(name) for column, name in shown.items()}
        for label, one in results["differences"].items()
    }


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
    if metrics[NLL]:
        cells["NLL"] = metrics[NLL]["best"].mean
    return cells
