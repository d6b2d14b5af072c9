"""What is shown to people: lines and tables on the console, Markdown, JSON, pictures as PNG.

The scripts print through `show` and `show_table`, so that nothing a user wrote (titles, labels,
names of files) is taken for markup or obeyed by a terminal. Files are written atomically: a run
that is cut off leaves no half-written report.
"""

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tca4rec_jax.fileio import atomic_path, write_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.terminal import plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | Interval | None
Rows = Mapping[str, Mapping[str, Cell]]
"""A table: {row label: {column: value}}."""
_WIDTH = 80  # of tables where no terminal says its own


def picture_text(text: str) -> str:
    """The text as matplotlib shows it: no formula between dollars, nor an underscore that hides."""
    text = plain_text(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def show(*lines: str, error: bool = False) -> None:
    """Prints lines as they are, but for what `plain_text` replaces; to stderr if `error`."""
    for line in lines:
        print(plain_text(line), file=sys.stderr if error else sys.stdout, flush=error)


def markdown_table(rows: Rows, *, first_column: str = "", digits: int = 4) -> str:
    """The table as Markdown; a missing value is '-'. Raises ValueError if there are no rows."""
    header, *lines = table_lines(rows, first_column=first_column, digits=digits)
    ruled = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in ruled]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def show_table(rows: Rows, *, title: str, first_column: str = "", digits: int = 4) -> str:
    """Prints a title and the table; columns beyond the terminal's width, or 80, follow below.

    Returns them as Markdown. Raises ValueError if there are no rows.
    """
    show(title)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
    every = table_lines(rows, first_column=first_column, digits=digits)
    for header, *lines in _parts(every, width):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for number, column in enumerate(map(Text, header)):
            table.add_column(column, justify="right" if number else "left")
        for line in lines:
            table.add_row(*map(Text, line))
        Console(width=10_000, force_jupyter=False).print(table, "")  # a cell is never cut
    return f"{title}\n\n{markdown_table(rows, first_column=first_column, digits=digits)}"


def table_lines(rows: Rows, *, first_column: str = "", digits: int = 4) -> list[list[str]]:
    """The header, with the columns of all rows in order of first appearance, and the cells.

    A missing value is '-'. Raises ValueError if there are no rows.
    """
    check_rows(rows)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[first_column, *columns]]
    for label, row in rows.items():
        lines.append([label, *(_cell(row.get(column), digits) for column in columns)])
    return [list(map(plain_text, line)) for line in lines]


def _parts(lines: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """The lines cut between columns to so many characters; each part has the first column."""
    label, *widths = (max(map(cell_len, column)) + 2 for column in zip(*lines, strict=True))
    start, filled = 1, label
    for number, column in enumerate(widths, start=1):
        if filled + column - 2 > width and number > start:
            yield [[line[0], *line[start:number]] for line in lines]
            start, filled = number, label
        filled += column
    yield [[line[0], *line[start:]] for line in lines]


def write_results(path: Path, results: Mapping) -> None:
    """Writes results as JSON; intervals become {mean, low, high}, arrays become lists.

    Raises ValueError for a number that is not finite (JSON has none), TypeError for a value of
    another kind, both named by their keys.
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


def _cell(value: Cell, digits: int) -> str:
    """An interval as 'mean [low, high]', a float with `digits`, None as '-'."""
    if value is None:
        return "-"
    if isinstance(value, Interval):
        return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value:.{digits}f}" if isinstance(value, float | np.floating) else str(value)


def _plain(value, keys: tuple[str, ...]):
    """`value` in types that JSON knows."""
    if isinstance(value, Interval):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*keys, str(key))) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(inner, (*keys, str(index))) for index, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"result {'.'.join(keys)} is {value}, not a finite number")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"result {'.'.join(keys)} is a {type(value).__name__}, which JSON cannot hold")
