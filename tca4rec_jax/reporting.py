"""Tables for the console and for Markdown, results as JSON, and pictures as PNG.

Files are written atomically: a run that is cut off leaves no half-written report.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from tca4rec_jax.fileio import atomic_path, write_text
from tca4rec_jax.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | Interval | None


def markdown_table(
    rows: Mapping[str, Mapping[str, Cell]], *, first_column: str = "", digits: int = 4
) -> str:
    """A table {row label: {column: value}} as Markdown; a missing value is '-'.

    Raises:
      ValueError: there are no rows.
    """
    check_rows(rows)
    columns = _columns(rows)
    lines = [[first_column, *columns], ["---", *["---:"] * len(columns)]]
    for label, row in rows.items():
        lines.append([label, *(_format_cell(row.get(column), digits) for column in columns)])
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
    check_rows(rows)
    columns = _columns(rows)
    table = Table(title=title, title_justify="left")
    table.add_column(first_column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(_format_cell(row.get(column), digits) for column in columns))
    return table


def write_results(path: Path, results: Mapping) -> None:
    """Writes results as JSON; intervals become {mean, low, high}, arrays become lists.

    Raises:
      ValueError: a number that is not finite (JSON has none), named by its keys.
      TypeError: a value of another kind, named by its keys.
    """
    write_text(path, json.dumps(_plain(results, ()), indent=2, allow_nan=False) + "\n")


def save_figure(path: Path, figure: "Figure") -> None:
    """Writes a matplotlib figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def check_rows(rows: Mapping) -> None:
    """Raises ValueError if there is nothing to show."""
    if not rows:
        raise ValueError("a table or picture of results needs at least one row")


def _format_cell(value: Cell, digits: int = 4) -> str:
    """One table cell: an interval as 'mean [low, high]', a float with `digits`, None as '-'."""
    if value is None:
        return "-"
    if isinstance(value, Interval):
        return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}f}"
    return str(value)


def _columns(rows: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """The columns of all rows in order of first appearance."""
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def _plain(value, keys: tuple[str, ...]):
    """`value` in types that JSON knows."""
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner, (*keys, str(index))) for index, inner in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"result {'.'.join(keys)} is {value}, not a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"result {'.'.join(keys)} is a {type(value).__name__}, which JSON cannot hold")
