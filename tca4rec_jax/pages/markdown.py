"""Sections as Markdown."""

from collections.abc import Iterable

from tca4rec_jax.pages.blocks import Block, Command, Numbers, Pictures, Section, Text
from tca4rec_jax.reporting import markdown_table
from tca4rec_jax.terminal import plain_text


def markdown_page(title: str, lead: Iterable[Block], sections: Iterable[Section]) -> str:
    """The text of a page: a title, what stands before the first heading, the sections.

    Pictures are those that lie beside the page. Raises ValueError for a table without rows, and
    TypeError for posters, which Markdown has not.
    """
    parts = [f"# {title}\n", *map(_markdown, lead)]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}\n")
        parts += [_markdown(block) for block in section.blocks if not _is_closed(block)]
    return "\n".join(parts)


def _is_closed(block: Block) -> bool:
    return isinstance(block, Numbers) and block.is_closed


def _markdown(block: Block) -> str:
    match block:
        case Text(text):
            return f"{text}\n"
        case Command(text):
            return f"    {plain_text(text)}\n"
        case Numbers():
            return markdown_table(block.rows, first_column=block.first_column)
        case Pictures(_, file, alt):
            return f"![{plain_text(alt)}]({file})\n"
    raise TypeError(f"{type(block).__name__} is nothing that Markdown has")
