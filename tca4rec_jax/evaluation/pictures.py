"""Figures of an evaluation: each of the panels that it is asked for, for a PNG or a page.

Axis letters: R rows.
"""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import check_rows, picture_text

LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
"""Okabe and Ito's colours, told apart with any colour vision; each has its marker, too."""
Curve = Sequence[Mapping[str, float]]
"""The log of a run: [{'step': .., 'loss': .., ...}, ...]; a record may lack a quantity."""
_RAW = 20
"""Of fewer values of a quantity the line goes through all."""
_WRAPPED = 26  # characters of a label
_SMOOTHED = 0.1  # the span of the moving average, of all values
_INSIDE = 3  # labels that a panel of training curves has room for
_DASHES = ("-", "--", ":", "-.")
DRAWN = 200
"""Points of a training curve that are drawn, evenly spaced."""


def training_figure(
    curves: Mapping[str, Curve], keys: Sequence[str], *, alike: Mapping[str, str] | None = None
) -> Figure:
    """One panel per quantity of `keys` that was recorded, and one line per run.

    Lines of many values are exponential moving averages, with the values pale behind them; of more
    than DRAWN points these are drawn. Runs of one name in `alike`, {run: name}, look alike and
    share that label. Raises ValueError if there is nothing to draw or a record has no 'step'.
    """
    keys = recorded(curves, keys)
    if not keys:
        raise ValueError(f"the training curves {list(curves)} hold no quantity to draw")
    labels = {name: (alike or {}).get(name, name) for name in curves}
    styles = itertools.cycle(itertools.product(_DASHES, LOOKS))
    looks = dict(zip(dict.fromkeys(labels.values()), styles, strict=False))
    is_below = len(looks) > _INSIDE
    height = 3.6 + 0.13 * len(looks) * is_below
    figure, panels = panels_of(len(keys), 5.0 * len(keys), height)
    for panel, key in zip(panels, keys, strict=True):
        for name, curve in curves.items():
            dashes, (color, marker) = looks[labels[name]]
            look = {"color": color, "linestyle": dashes, "label": picture_text(labels[name])}
            points = [(record["step"], record[key]) for record in curve if key in record]
            if points:
                _draw_run(panel, np.array(points, np.float64), marker, look)
        panel.set(xlabel="step", ylabel=key)
    handles, names = panels[0].get_legend_handles_labels()
    one_each = dict(zip(names, handles, strict=True))
    place = {"loc": "outside lower center", "ncols": 2} if is_below else {}
    of = figure if is_below else panels[0]
    of.legend(one_each.values(), one_each.keys(), frameon=False, **place)
    return figure


def _draw_run(panel: Axes, points: np.ndarray, marker: str, look: Mapping[str, Any]) -> None:
    """Draws one quantity of a run, float64 [steps, 2]: step and value."""
    steps, values = points.T
    if len(points) <= _RAW:  # a line alone would hide a single value
        panel.plot(steps, values, marker=marker, ms=4, **look)
        return
    at = np.linspace(0, len(points) - 1, min(len(points), DRAWN)).round().astype(int)
    panel.plot(steps[at], values[at], color=look["color"], alpha=0.25, linewidth=0.8)
    panel.plot(steps[at], smoothed(values)[at], linewidth=2, **look)


def recorded(curves: Mapping[str, Curve], keys: Iterable[str]) -> list[str]:
    """The keys that some record has. Raises ValueError if a record has no 'step'."""
    records = [record for curve in curves.values() for record in curve]
    if any("step" not in record for record in records):
        raise ValueError("every record of a training curve needs a 'step'")
    return [key for key in keys if any(key in record for record in records)]


def smoothed(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64: the exponential moving average at every value, of those up to it."""
    return pd.Series(values).ewm(span=_SMOOTHED * len(values)).mean().to_numpy()


def metrics_figure(
    rows: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str], *, width: float = 3.4
) -> Figure:
    """One panel per metric, so many inches wide: each model's mean and interval as a bar.

    Raises ValueError if there is no model or metric, or a model lacks one of the metrics.
    """
    check_rows(rows)
    missing = [(label, m) for label, row in rows.items() for m in metrics if m not in row]
    if missing or not metrics:
        raise ValueError(f"nothing to draw: metrics {list(metrics)}, missing {missing}")
    size = 2.2 + width * len(metrics), 1.2 + 0.35 * len(rows)
    figure, panels = panels_of(len(metrics), *size, bars=True)
    for panel, metric in zip(panels, metrics, strict=True):
        means, errors = _means_and_errors(row[metric] for row in rows.values())
        labels = list(map(picture_text, rows))
        panel.barh(labels, means, xerr=errors, color=LOOKS[0][0], alpha=0.7, capsize=3)
        panel.set(xlabel=f"{metric.upper()} (95% interval)")
    panels[0].invert_yaxis()
    return figure


def intervals_figure(
    rows: Mapping[str, Mapping[str, Interval | None]], xlabel: str, *, width: float = 9.0
) -> Figure:
    """A line of points per row, with a line at 0 where that is in sight: means and intervals.

    Rows are {slice: {model: interval}} or {difference: {metric: interval}}; None is left out.
    Raises ValueError if there are none.
    """
    check_rows(rows)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    height = 1.2 + len(rows) * max(0.35, 0.08 * len(names)) + 0.2 * len(names) * (len(names) > 1)
    figure, (panel,) = panels_of(1, width, height, bars=True)
    for number, (name, look) in enumerate(zip(names, itertools.cycle(LOOKS))):
        of_row = [(at, row.get(name)) for at, row in enumerate(rows.values())]
        there = [(at, interval) for at, interval in of_row if interval is not None]
        means, errors = _means_and_errors(interval for _, interval in there)
        at = np.array([at for at, _ in there]) + 0.7 * ((number + 0.5) / len(names) - 0.5)
        label = picture_text(name)
        panel.errorbar(means, at, xerr=errors, fmt=look[1], color=look[0], ms=4, label=label)
    if panel.get_xlim()[0] < 0 < panel.get_xlim()[1]:
        panel.axvline(0, color="black", linewidth=0.8)
    panel.set(xlabel=f"{xlabel} (95% interval)", yticks=range(len(rows)))
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_yticklabels([textwrap.fill(picture_text(name), _WRAPPED) for name in rows])
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def sweep_figure(
    curve: Mapping[float, Mapping[str, Interval]],
    metrics: Sequence[str],
    *,
    baseline: tuple[str, Mapping[str, Interval]],
) -> Figure:
    """One panel per metric over lambda, a baseline (label, {metric: ..}) dashed."""
    values = sorted(curve)
    figure, panels = panels_of(len(metrics), 4.6 * len(metrics), 3.4)
    for panel, metric in zip(panels, metrics, strict=True):
        means, low, high = np.array([curve[value][metric] for value in values]).T
        panel.fill_between(values, low, high, alpha=0.2)
        panel.plot(values, means, "o-", label="LLM and CF model")
        panel.axhline(baseline[1][metric].mean, color="C1", linestyle="--", label=baseline[0])
        panel.set_xscale("symlog", linthresh=0.25)
        panel.set(xlabel="lambda", ylabel=f"{metric.upper()} (95% interval)")
    panels[0].legend(frameon=False)
    return figure


def lines_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, equal: str = "", **labels: Any
) -> Figure:
    """A line through the points (x, y) of each name; `labels` as matplotlib's Axes.set takes.

    `equal` names a dashed line where y is x; '' draws none.
    """
    check_rows(lines)
    figure, (panel,) = panels_of(1, 5.0, 3.6 + 0.1 * len(lines))
    for (name, points), (color, marker) in zip(lines.items(), itertools.cycle(LOOKS)):
        panel.plot(*points, color=color, marker=marker, ms=4, label=picture_text(name))
    if equal:
        panel.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1, label=equal)
    panel.set(**labels)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def counts_figure(counts: Mapping[str, Mapping[str, int]], xlabel: str, ylabel: str) -> Figure:
    """A map of counts {row: {column: count}}, darker for more, with every count in its square."""
    check_rows(counts)
    names = list(next(iter(counts.values())))
    count = np.array([[row[name] for name in names] for row in counts.values()])
    figure, (panel,) = panels_of(1, 5.0, 1.2 + 0.35 * len(counts))
    panel.grid(False)
    shade = np.ma.masked_equal(np.log1p(count), 0)
    panel.imshow(shade, cmap="Blues", aspect="auto", vmax=1.2 * np.log1p(count.max()))
    for (row, column), number in np.ndenumerate(count):
        is_dark = np.log1p(number) > 0.7 * np.log1p(count.max())
        color = "white" if is_dark else "black"
        panel.text(column, row, str(number), ha="center", va="center", color=color, fontsize=9)
    panel.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(names)), yticks=range(len(counts)))
    panel.set_xticklabels(names)
    panel.set_yticklabels(list(counts))
    return figure


def panels_of(count: int, width: float, height: float, bars: bool = False):
    """A figure of this size in inches, and its panels side by side; `bars` share their labels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, sharey=bars)[0]
    for panel in panels:
        panel.grid(axis="x" if bars else "both", alpha=0.3)
    return figure, panels


def _means_and_errors(intervals: Iterable[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [R] and [2, R]: how far the intervals reach to both sides."""
    means, low, high = np.array([*intervals]).T
    return means, np.maximum(np.stack([means - low, high - means]), 0)
