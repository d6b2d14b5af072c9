"""Reports of an evaluation: tables, results.json, pictures and readable examples.

Everything takes plain dicts and arrays. Files are written beside their place and then renamed, so a
run that is cut off leaves no half-written report.

Axis letters: R rows, H history items, K places of a list.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from tca4rec_jax.metrics import Interval

Cell = str | int | float | Interval | None


def format_cell(value: Cell, digits: int = 4) -> str:
    """One table cell: an interval as 'mean [low, high]', a float with `digits`, None as '-'."""
    if value is None:
        return "-"
    if isinstance(value, Interval):
        return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}f}"
    return str(value)


def table_columns(rows: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """The columns of all rows in order of first appearance."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def markdown_table(
    rows: Mapping[str, Mapping[str, Cell]], *, first_column: str = "", digits: int = 4
) -> str:
    """A table {row label: {column: value}} as Markdown; a missing value is '-'.

    Raises:
      ValueError: there are no rows.
    """
    _need_rows(rows)
    columns = table_columns(rows)
    lines = [[first_column, *columns], ["---", *["---:"] * len(columns)]]
    for label, row in rows.items():
        lines.append([label, *(format_cell(row.get(column), digits) for column in columns)])
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def console_table(
    rows: Mapping[str, Mapping[str, Cell]],
    *,
    title: str,
    first_column: str = "",
    digits: int = 4,
) -> Table:
    """The same table for rich's console. Raises ValueError if there are no rows."""
    _need_rows(rows)
    columns = table_columns(rows)
    table = Table(title=title, title_justify="left")
    table.add_column(first_column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(format_cell(row.get(column), digits) for column in columns))
    return table


def write_results(path: Path, results: Mapping) -> None:
    """Writes results as JSON; intervals become {mean, low, high}, arrays become lists.

    Raises:
      ValueError: a number that is not finite (JSON has none), named by its keys.
      TypeError: a value of another kind, named by its keys.
    """
    text = json.dumps(_plain(results, ()), indent=2, allow_nan=False) + "\n"
    _write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8)."""
    _write_beside(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plot_training_curves(
    path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]], *, keys: Sequence[str] = ()
) -> None:
    """A PNG with one panel per quantity and one line per run.

    Args:
      curves: {run: [{'step': .., 'loss': .., ...}, ...]}; a record may lack a quantity.
      keys: the quantities to draw; all numeric ones but 'step' if empty.

    Raises:
      ValueError: there is nothing to draw, or a record has no 'step'.
    """
    records = [record for curve in curves.values() for record in curve]
    if any("step" not in record for record in records):
        raise ValueError("every record of a training curve needs a 'step'")
    numeric = [k for r in records for k, v in r.items() if isinstance(v, int | float)]
    keys = list(keys) or [key for key in dict.fromkeys(numeric) if key != "step"]
    if not keys:
        raise ValueError(f"the training curves {list(curves)} hold no quantity to draw")
    figure = Figure(figsize=(5.0 * len(keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        for name, curve in curves.items():
            points = [(record["step"], record[key]) for record in curve if key in record]
            if points:
                # A dot where there is a single point: a line would be invisible.
                panel.plot(*zip(*points, strict=True), "o-" if len(points) < 2 else "-", label=name)
        panel.set(xlabel="step", ylabel=key)
        panel.grid(alpha=0.3)
    panels[0].legend()
    save_figure(path, figure)


def plot_metrics(
    path: Path, rows: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str]
) -> None:
    """A PNG with one panel per metric: each model's mean and interval as a horizontal bar.

    Raises:
      ValueError: no model or metric, or a model lacks one of the metrics.
    """
    _need_rows(rows)
    missing = [(label, m) for label, row in rows.items() for m in metrics if m not in row]
    if missing or not metrics:
        raise ValueError(f"nothing to draw: metrics {list(metrics)}, missing {missing}")
    labels = list(rows)
    height = 1.2 + 0.35 * len(labels)
    figure = Figure(figsize=(2.2 + 3.4 * len(metrics), height), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        means = np.array([rows[label][metric].mean for label in labels])
        low = np.array([rows[label][metric].low for label in labels])
        high = np.array([rows[label][metric].high for label in labels])
        errors = np.maximum(np.stack([means - low, high - means]), 0)
        panel.barh(labels, means, xerr=errors, color="C0", alpha=0.7, capsize=3)
        panel.set(xlabel=f"{metric} (95% interval)")
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    save_figure(path, figure)


def plot_sweep(
    path: Path,
    curve: Mapping[float, Mapping[str, Interval]],
    metrics: Sequence[str],
    *,
    level: tuple[str, Mapping[str, Interval]],
) -> None:
    """A PNG with one panel per metric over lambda; `level` (label, metrics) is a dashed line.

    Raises:
      ValueError: there is nothing to draw.
    """
    _need_rows(curve)
    values = np.array(sorted(curve))
    figure = Figure(figsize=(4.6 * len(metrics), 3.4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        means, low, high = np.array([curve[value][metric] for value in values.tolist()]).T[:3]
        panel.fill_between(values, low, high, alpha=0.2)
        panel.plot(values, means, "o-", label="LLM and CF model")
        panel.axhline(level[1][metric].mean, color="C1", linestyle="--", label=level[0])
        panel.set_xscale("symlog", linthresh=0.25)
        panel.set(xlabel="lambda", ylabel=f"{metric} (95% interval)")
        panel.grid(alpha=0.3)
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
    """Readable examples in Markdown: what was watched, what each model recommends, what came next.

    Args:
      titles: item i's title at i.
      history_RxH: int, oldest first, -1 for padding.
      recommended: {model: items int [R, K], best first, -1 for none}.
      target_R: int, the item that came next.
      rows: which rows to show.
      top: recommendations shown for each model.
    """

    def names(items) -> list[str]:
        return [titles[item] for item in np.asarray(items).tolist() if item >= 0]

    parts = []
    for number, row in enumerate(rows, start=1):
        target = int(target_R[row])
        lines = [f"### Example {number} (row {row})", "", "History, oldest first:", ""]
        lines += [f"- {name}" for name in names(history_RxH[row])]
        for model, items_RxK in recommended.items():
            items_K = np.asarray(items_RxK[row])
            lines += ["", f"{model} recommends:", ""]
            for place, item in enumerate(items_K[items_K >= 0][:top].tolist(), start=1):
                mark = " **(what came next)**" if item == target else ""
                lines.append(f"{place}. {titles[item]}{mark}")
        lines += ["", f"What came next: **{titles[target]}**", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _need_rows(rows: Mapping) -> None:
    if not rows:
        raise ValueError("a table or picture of results needs at least one row")


def _plain(value, keys: tuple[str, ...]):
    """`value` in types that JSON knows."""
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner, (*keys, str(place))) for place, inner in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"result {'.'.join(keys)} is {value}, not a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"result {'.'.join(keys)} is a {type(value).__name__}, which JSON cannot hold")


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    FigureCanvasAgg(figure)
    _write_beside(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _write_beside(path: Path, write: Callable[[Path], object]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    temporary.replace(path)
