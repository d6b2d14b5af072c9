"""Reports: pictures and readable examples of an evaluation, and the report on the CF models.

Axis letters: R rows, H history items, M places of a list.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import (
    Rows,
    check_rows,
    markdown_table,
    picture_text,
    save_figure,
    show_table,
)
from tca4rec_jax.terminal import plain_text

CF_METRICS = ("hr@1", "hr@3", "hr@5", "hr@10", "hr@20", "ndcg@3", "ndcg@5", "ndcg@10", "ndcg@20")


def plot_training_curves(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], keys: Sequence[str]
) -> None:
    """A PNG with one panel per quantity of `keys` that was recorded, and one line per run.

    Curves are {run: [{'step': .., 'loss': .., ...}, ...]}; a record may lack a quantity. Raises
    ValueError if there is nothing to draw or a record has no 'step'.
    """
    records = [record for curve in curves.values() for record in curve]
    if any("step" not in record for record in records):
        raise ValueError("every record of a training curve needs a 'step'")
    keys = [key for key in keys if any(key in record for record in records)]
    if not keys:
        raise ValueError(f"the training curves {list(curves)} hold no quantity to draw")
    figure, panels = _panels(len(keys), 5.0 * len(keys), 3.6)
    for panel, key in zip(panels, keys, strict=True):
        for name, curve in curves.items():
            label = picture_text(name)
            points = [(record["step"], record[key]) for record in curve if key in record]
            if points:
                # A dot where there is a single point: a line would be invisible.
                line = "o-" if len(points) < 2 else "-"
                panel.plot(*zip(*points, strict=True), line, label=label)
        panel.set(xlabel="step", ylabel=key)
    panels[0].legend()
    save_figure(path, figure)


def plot_metrics(
    path: Path, rows: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str]
) -> None:
    """A PNG with one panel per metric: each model's mean and interval as a horizontal bar.

    Raises ValueError if there is no model or metric, or a model lacks one of the metrics.
    """
    check_rows(rows)
    missing = [(label, m) for label, row in rows.items() for m in metrics if m not in row]
    if missing or not metrics:
        raise ValueError(f"nothing to draw: metrics {list(metrics)}, missing {missing}")
    size = 2.2 + 3.4 * len(metrics), 1.2 + 0.35 * len(rows)
    figure, panels = _panels(len(metrics), *size, bars=True)
    for panel, metric in zip(panels, metrics, strict=True):
        means, low, high = np.array([row[metric] for row in rows.values()]).T
        errors = np.maximum(np.stack([means - low, high - means]), 0)
        labels = list(map(picture_text, rows))
        panel.barh(labels, means, xerr=errors, color="C0", alpha=0.7, capsize=3)
        panel.set(xlabel=f"{metric} (95% interval)")
    panels[0].invert_yaxis()
    save_figure(path, figure)


def plot_slices(path: Path, slices: Mapping[str, Mapping[str, Interval]], metric: str) -> None:
    """A PNG with one line of points per slice: each model's mean and interval."""
    check_rows(slices)
    models = list(next(iter(slices.values())))
    figure, (panel,) = _panels(1, 9.0, 1.4 + 0.45 * len(slices), bars=True)
    for number, model in enumerate(models):
        means, low, high = np.array([row[model] for row in slices.values()]).T
        errors = np.maximum(np.stack([means - low, high - means]), 0)
        at = np.arange(len(slices)) + 0.7 * ((number + 0.5) / len(models) - 0.5)
        panel.errorbar(means, at, xerr=errors, fmt="o", ms=3, label=picture_text(model))
    panel.set(xlabel=f"{metric} (95% interval)", yticks=range(len(slices)))
    panel.set_yticklabels(list(map(picture_text, slices)))
    panel.invert_yaxis()
    figure.legend(loc="outside right upper")
    save_figure(path, figure)


def plot_sweep(
    path: Path,
    curve: Mapping[float, Mapping[str, Interval]],
    metrics: Sequence[str],
    *,
    baseline: tuple[str, Mapping[str, Interval]],
) -> None:
    """A PNG with one panel per metric over lambda, a baseline (label, {metric: ..}) dashed."""
    values = sorted(curve)
    figure, panels = _panels(len(metrics), 4.6 * len(metrics), 3.4)
    for panel, metric in zip(panels, metrics, strict=True):
        means, low, high = np.array([curve[value][metric] for value in values]).T
        panel.fill_between(values, low, high, alpha=0.2)
        panel.plot(values, means, "o-", label="LLM and CF model")
        panel.axhline(baseline[1][metric].mean, color="C1", linestyle="--", label=baseline[0])
        panel.set_xscale("symlog", linthresh=0.25)
        panel.set(xlabel="lambda", ylabel=f"{metric} (95% interval)")
    panels[0].legend()
    save_figure(path, figure)


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
            **{f"entropy, beta {beta}": nats for beta, nats in values["entropy"].items()},
        }
        for model, values in metrics["profiles"].items()
    }
    text = [
        f"# {_cf_title(metrics)}\n",
        markdown_table(ranking, first_column="model, rows"),
        "What the Collaborative Tokenizer will see, on the test rows. Coverage: share of the items "
        "that are among anyone's first ten. Popularity: training interactions of the first tens, "
        "relative to those of the items that were chosen. Best beta: the CF temperature at which "
        "the model is best calibrated (lowest NLL). Entropy in nats.\n",
        markdown_table(character, first_column="model"),
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


def _panels(count: int, width: float, height: float, bars: bool = False):
    """A figure of this size in inches, and its panels side by side; `bars` share their labels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=bars)[0]
    for panel in panels:
        panel.grid(axis="x" if bars else "both", alpha=0.3)
    return figure, panels


def _plot_cf_models(path: Path, metrics: Mapping) -> None:
    """A PNG: NDCG@K, entropy and NLL of each CF model."""
    figure, (quality, entropy, likelihood) = _panels(3, 12, 3.6)
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
