"""The pictures of a grid's page: lines in panels, and differences with their intervals."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from tca4rec_jax.evaluation.pictures import LOOKS
from tca4rec_jax.experiments.curves import PLAIN, Panels, Series
from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import check_rows, picture_text

_PLAIN = "#555555", "X"
_DASHES = ("-", "--", ":", "-.")
_PANEL = 3.4, 2.7  # inches


def lines_figure(
    panels: Panels, xlabel: str, *, scale: str = "linear", among: Panels | None = None
) -> Figure:
    """A row for each quantity and a column for each panel.

    `scale` is 'linear', 'log', or 'log from 0', which is logarithmic with 0 at the left. Lines look
    as in a figure of the panels `among` which these are. Raises ValueError without panels.
    """
    check_rows(panels)
    columns = [*dict.fromkeys(name for row in panels.values() for name in row)]
    every = panels if among is None else among
    lines = [line for row in every.values() for of in row.values() for line in of]
    looks = _looks(line.color for line in lines)
    names = sorted(dict.fromkeys(line.style for line in lines), key=bool)  # '' is a full line
    styles = dict(zip(names, itertools.cycle(_DASHES)))
    size = 0.6 + _PANEL[0] * len(columns), 0.9 + _PANEL[1] * len(panels)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), len(columns), squeeze=False)
    for axes_row, (quantity, row) in zip(grid, panels.items(), strict=True):
        for axes, column in zip(axes_row, columns, strict=True):
            of_panel = row.get(column, [])
            for line in of_panel:
                _draw(axes, line, *looks[line.color], styles[line.style])
            axes.grid(alpha=0.3)
            axes.set_xlabel(xlabel)
            _scale(axes, scale, sorted({x for line in of_panel for x in line.x}))
            if axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
                axes.axhline(0, color="black", linewidth=0.8)
            if not of_panel:
                axes.text(0.5, 0.5, "missing", transform=axes.transAxes, ha="center", color="gray")
        axes_row[0].set_ylabel(picture_text(quantity))
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(picture_text(column), fontsize=10)
    own = {line.style for row in panels.values() for of in row.values() for line in of}
    _legend(figure, looks, {style: dashes for style, dashes in styles.items() if style in own})
    return figure


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{name: (color, marker)}, the same in every picture that has the same names."""
    ordered = sorted({*names} - {PLAIN})
    return {PLAIN: _PLAIN, **dict(zip(ordered, itertools.cycle(LOOKS)))}


def _draw(axes: Axes, line: Series, color: str, marker: str, dashes: Any) -> None:
    axes.plot(line.x, line.y, color=color, marker=marker, ms=4, linestyle=dashes, linewidth=1.3)
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.12, linewidth=0)


def _scale(axes: Axes, scale: str, values: Sequence[float]) -> None:
    """The x axis, with a tick at every value, or if there are many where matplotlib puts them."""
    positive = [value for value in values if value > 0]
    if scale == "log" and positive:
        axes.set_xscale("log")
    elif scale == "log from 0" and positive:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    elif scale != "linear" or len(values) > 8:
        return
    if len(values) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(_apart(axes, values)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="x", labelsize=8)


def _apart(axes: Axes, values: Sequence[float]) -> list[float]:
    """Those of the values whose labels do not touch, the first and the last among them."""
    place = axes.transData.transform([(value, 0.0) for value in values])[:, 0]
    wide = axes.transAxes.transform((1, 0))[0] - axes.transAxes.transform((0, 0))[0]
    least, kept = wide / 14, [0]
    for number in range(1, len(values)):
        if place[number] - place[kept[-1]] >= least:
            kept.append(number)
    if kept[-1] != len(values) - 1:
        kept[-1 if len(kept) > 1 else len(kept) :] = [len(values) - 1]
    return [values[number] for number in kept]


def _legend(
    figure: Figure, looks: Mapping[str, tuple[str, str]], styles: Mapping[str, Any]
) -> None:
    """Below the panels: what is drawn of the looks, and the styles if there are several."""
    drawn = {line.get_color() for axes in figure.axes for line in axes.lines}
    handles = {
        picture_text(name): Line2D([], [], color=color, marker=marker, ms=4)
        for name, (color, marker) in looks.items()
        if color in drawn
    }
    if len(styles) > 1:
        handles |= {
            picture_text(style or "as configured"): Line2D([], [], color="black", linestyle=dashes)
            for style, dashes in styles.items()
        }
    columns = min(len(handles), max(int(figure.get_figwidth() / 1.5), 1))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
    )


class Difference(NamedTuple):
    """What is drawn of an effect."""

    interval: Interval
    is_shown: bool


Differences = dict[str, dict[str, dict[str, Difference]]]
"""{panel: {row: {line: difference}}}."""


def differences_figure(
    panels: Differences, xlabel: str, *, among: Differences | None = None
) -> Figure:
    """A panel of intervals each; those of differences that are shown have full marks.

    Marks look as in a figure of the panels `among` which these are. Raises ValueError if there is
    nothing to draw.
    """
    check_rows(panels)
    rows = [*dict.fromkeys(row for panel in panels.values() for row in panel)]
    of_rows = [of for panel in panels.values() for of in panel.values()]
    every = panels if among is None else among
    looks = _looks(line for panel in every.values() for of in panel.values() for line in of)
    lines = [name for name in looks if any(name in of for of in of_rows)]
    height = 0.9 + max((0.15 + 0.14 * len(lines)) * len(rows), 1.4)
    figure = Figure(figsize=(1.8 + 3.0 * len(panels), height), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        for (row, of), (number, line) in itertools.product(panel.items(), enumerate(lines)):
            if line in of:
                place = rows.index(row) + 0.75 * ((number + 0.5) / len(lines) - 0.5)
                _draw_difference(axes, of[line], place, *looks[line])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(picture_text(name), fontsize=10)
        axes.set_xlabel(picture_text(xlabel), fontsize=9)
        axes.set_yticks(range(len(rows)), [*map(picture_text, rows)])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
    _legend(figure, looks, {})
    return figure


def _draw_difference(
    axes: Axes, difference: Difference, place: float, color: str, marker: str
) -> None:
    mean, low, high = difference.interval
    error = np.maximum([[mean - low], [high - mean]], 0)
    face = color if difference.is_shown else "white"
    axes.errorbar([mean], [place], xerr=error, fmt=marker, ms=5, color=color, mfc=face, capsize=2)
