"""Readable examples of an evaluation, and the report on the CF models.

Axis letters: R rows, H history items, M places of a list.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tca4rec_jax.evaluation.pictures import panels_of
from tca4rec_jax.fileio import write_text
from tca4rec_jax.reporting import Rows, markdown_table, save_figure, show_table
from tca4rec_jax.terminal import plain_text

CF_METRICS = ("hr@1", "hr@3", "hr@5", "hr@10", "hr@20", "ndcg@3", "ndcg@5", "ndcg@10", "ndcg@20")


def examples_text(
    titles: Sequence[str],
    history_RxH: np.ndarray,
    recommended: Mapping[str, np.ndarray],
    target_R: np.ndarray,
    rows: Sequence[int],
    *,
    top: int = 5,
) -> str:
    """Examples in Markdown: history, recommendations of each model, and the item that came next.

    Of the given rows; all arrays hold items, histories oldest first, -1 for none. `recommended` are
    {model: int [R, M], best first}, of which the first `top` are shown.
    """
    parts = []
    for number, row in enumerate(rows, start=1):
        target = int(target_R[row])
        lines = [f"### Example {number} (row {row})", "", "History, oldest first:", ""]
        lines += [f"- {plain_text(titles[item])}" for item in history_RxH[row] if item >= 0]
        for model, items_RxM in recommended.items():
            lines += ["", f"{plain_text(model)} recommends:", ""]
            best_M = [item for item in items_RxM[row] if item >= 0][:top]
            for place, item in enumerate(best_M, start=1):
                mark = " **(what came next)**" if item == target else ""
                lines.append(f"{place}. {plain_text(titles[item])}{mark}")
        lines += ["", f"What came next: **{plain_text(titles[target])}**", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def show_cf_results(metrics: Mapping) -> None:
    """Prints of the results of `run_cf` what fits 80 columns; metrics.json has the rest."""
    columns = {"HR@10": "hr@10", "NDCG@10": "ndcg@10", "NLL": "nll", "entropy": "entropy"}
    show_table(_cf_rows(metrics, columns), title=_cf_title(metrics), first_column="model, rows")


def write_cf_report(directory: Path, metrics: Mapping) -> None:
    """Writes report.md and report.png of what `cf.pipeline.run_cf` returns."""
    ranking = _cf_rows(metrics, {name.upper(): name for name in CF_METRICS})
    character = {
        model: {
            "coverage@10": values["coverage@10"],
            "relative popularity@10": values["relative popularity@10"],
            "best beta": f"{values['best_beta']:g}",
        }
        for model, values in metrics["profiles"].items()
    }
    by_beta = {
        f"{model}, {quantity}": {f"beta {beta}": nats for beta, nats in values[name].items()}
        for model, values in metrics["profiles"].items()
        for quantity, name in (("NLL", "nll"), ("entropy", "entropy"))
    }
    text = [
        f"# {_cf_title(metrics)}\n",
        markdown_table(ranking, first_column="model, rows"),
        "What the Collaborative Tokenizer will see, on the test rows. Coverage: share of the items "
        "that are among anyone's first ten. Popularity: training interactions of the first tens, "
        "relative to those of the items that were chosen. Best beta: the CF temperature at which "
        "the model is best calibrated (lowest NLL).\n",
        markdown_table(character, first_column="model"),
        "NLL of what was chosen and entropy of the softmax, in nats, by CF temperature.\n",
        markdown_table(by_beta, first_column="model"),
        "![metrics and sharpness](report.png)\n",
    ]
    write_text(directory / "report.md", "\n".join(text))
    _plot_cf_models(directory / "report.png", metrics)


def _cf_title(metrics: Mapping) -> str:
    """Which items all of its models rank."""
    without = " but the row's history" if metrics.get("filter_seen") else ""
    return f"CF models, ranking the whole catalogue{without}"


def _cf_rows(metrics: Mapping, columns: Mapping[str, str]) -> Rows:
    """The results of `run_cf` with the given columns {heading: metric}."""
    return {
        f"{model}, {subset}": {"rows": values["rows"]}
        | {heading: values[name] for heading, name in columns.items()}
        for model, subsets in metrics["results"].items()
        for subset, values in subsets.items()
    }


def _plot_cf_models(path: Path, metrics: Mapping) -> None:
    """A PNG: NDCG@K, entropy and NLL of each CF model."""
    figure, (quality, entropy, likelihood) = panels_of(3, 12, 3.6)
    cutoffs = (1, 3, 5, 10, 20)
    for model, subsets in metrics["results"].items():
        values = [subsets["test"][f"ndcg@{k}"] for k in cutoffs]
        quality.plot(cutoffs, values, "o-", label=model)
    quality.set(xlabel="K", ylabel="NDCG@K (test)")
    for panel, name in ((entropy, "entropy"), (likelihood, "nll")):
        for values in metrics["profiles"].values():
            panel.plot([float(beta) for beta in values[name]], list(values[name].values()), "o-")
        panel.set(xlabel="CF temperature beta", ylabel=f"{name}, nats", xscale="log")
    lowest = min(min(values["nll"].values()) for values in metrics["profiles"].values())
    likelihood.set_ylim(0.8 * lowest, 2.5 * lowest)  # far too sharp a softmax would hide the rest
    quality.legend()
    save_figure(path, figure)
