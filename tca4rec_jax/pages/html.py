"""Sections as one HTML file, and the template that all HTML pages begin with.

A page reaches no network: its policy (in base.html) lets a browser load nothing, its pictures are
SVG in the file itself. Every text is escaped.
"""

import base64
import io
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from tca4rec_jax.pages.blocks import Block, Numbers, Section
from tca4rec_jax.reporting import table_lines
from tca4rec_jax.terminal import plain_text

_HERE = Path(__file__).parent
_LETTER = re.compile(r"[^\W\d_]")
_PIXELS = 96  # of CSS, an inch


def html_page(title: str, lead: Iterable[Block], sections: Iterable[Section]) -> str:
    """The page: a title, what stands before the first heading, a list of the sections, these.

    For a screen of any width and for paper. Raises ValueError for a table without rows.
    """
    return template(_HERE / "report.html").render(title=title, lead=lead, sections=[*sections])


@cache
def template(path: Path) -> Template:
    """A template that may extend base.html; an undefined name is an error."""
    loader = FileSystemLoader([path.parent, _HERE])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "plain": lambda text: plain_text(text.strip()),
        "parts": _parts,
        "svg": _svg,
        "lines": _lines,
        "kind": lambda block: type(block).__name__,
    }
    return environment.get_template(path.name)


def _parts(text: str) -> list[str]:
    """Of a paragraph, by turns: words, and code, which stood between backticks."""
    return plain_text(" ".join(text.split())).split("`")


def _svg(figure: Figure) -> dict[str, str | int]:
    """The attributes of an image: the figure itself, and its size in CSS pixels.

    The background is left out, so that the page's shows. The same figure has the same bytes.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tca4rec_jax"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    data = base64.b64encode(file.getvalue().encode()).decode()
    width, height = (round(_PIXELS * inches) for inches in figure.get_size_inches())
    return {"src": f"data:image/svg+xml;base64,{data}", "width": width, "height": height}


def _lines(numbers: Numbers) -> list[list[tuple[str, bool]]]:
    """The header and the lines of a table: cells, and whether each stands in a column of text.

    Of a column of numbers a cell breaks before an interval alone.
    """
    header, *lines = table_lines(numbers.rows, first_column=numbers.first_column)
    is_text = [any(map(_LETTER.search, column)) for column in zip(*lines, strict=True)]
    is_text[0] = True
    lines = [
        [
            cell if text else re.sub(r" (?!\[)", "\u00a0", cell)
            for cell, text in zip(line, is_text, strict=True)
        ]
        for line in lines
    ]
    return [[*zip(line, is_text, strict=True)] for line in (header, *lines)]
