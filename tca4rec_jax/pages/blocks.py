"""What a page of results is made of: sections of texts, tables, pictures and posters.

The same sections are read as Markdown (markdown.py) and as one HTML file (html.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from tca4rec_jax.reporting import Rows


class Text(NamedTuple):
    """A paragraph; `words` between backticks are code, nothing else is markup."""

    text: str


class Command(NamedTuple):
    """A line for a terminal."""

    text: str


class Numbers(NamedTuple):
    """A table.

    Attributes:
      rows: as in reporting.py.
      first_column: the heading of the row labels.
      caption: what the table shows; '' if the text before it says so.
      is_closed: whether a reader has to ask for it: what only some want to see. Markdown, which
        has no such thing, leaves it out.
    """

    rows: Rows
    first_column: str = ""
    caption: str = ""
    is_closed: bool = False


class Picture(NamedTuple):
    """A figure of one panel, so that it can be read on a phone, and in words what it shows."""

    alt: str
    figure: Figure


class Pictures(NamedTuple):
    """Figures of one kind, side by side where there is room.

    Attributes:
      pictures: each with its own words.
      file: of a picture of all of them for Markdown, relative to the page; '' if there is none.
      alt: what that shows.
    """

    pictures: Sequence[Picture]
    file: str = ""
    alt: str = ""


class Poster(NamedTuple):
    """An item as a card: its title, a note above, and whether it is the one that came next."""

    title: str
    note: str = ""
    is_target: bool = False


class Posters(NamedTuple):
    """A row of them, and whose they are."""

    caption: str
    posters: Sequence[Poster]


Block = Text | Command | Numbers | Pictures | Posters


class Section(NamedTuple):
    """A heading and what is below it; of level 2, or 3 within the section before it."""

    title: str
    blocks: Sequence[Block]
    level: int = 2
