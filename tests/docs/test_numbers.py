"""A section with a table of measured numbers says what they were measured with."""

import re

import pages
import pytest

# Made by a script (a grid's page says its own command), or of settings alone.
_OTHERS = {"results.md", "method.md", "configuration.md"}
_NUMBER = re.compile(r"\| *-?\d*\.\d+(?![^|]*`)[^|]*\|")
_MEASURED = {
    "a command": r"launch/\w+|tests/\w+\.py",
    "a machine": r"EPYC|Xeon|H100|v5e|AMD",
    "a date": r"November 2026",
}
_RANKED = {
    "a config or data": r"configs/|MovieLens|Beauty|Office_Products|quickstart",
    "how many items": r"[\d,]{3,} items",
    "how many rows": r"[\d,]+\s(test\s|validation\s)?rows",
    "a seed": r"\bseeds?\b",
}


def sections(text: str) -> dict[str, str]:
    """{heading: what stands below it}, code included."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def missing(section: str) -> list[str]:
    """What a section with a table of numbers does not say."""
    tables = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    if not _NUMBER.search(tables):
        return []
    expected = dict(_MEASURED)
    if re.search(r"NDCG|HR@", section):
        expected |= _RANKED
        if re.search(r"\| (LLM,|SmolLM2)", tables):
            expected["how many beams"] = r"\bbeams?\b"
    return [what for what, pattern in expected.items() if not re.search(pattern, section)]


@pytest.mark.parametrize(
    "page", [page for page in pages.PAGES if page.name not in _OTHERS], ids=lambda page: page.name
)
def test_measured_numbers_say_where_they_come_from(page):
    found = {name: missing(section) for name, section in sections(page.read_text()).items()}
    assert not {name: what for name, what in found.items() if what}


def test_a_table_that_says_nothing_is_found():
    table = "| LLM, alpha = 0 | 0.0512 |\n"
    assert missing(f"| NDCG@10 | |\n{table}") == [*_MEASURED, *_RANKED, "how many beams"]
    assert missing(table) == [*_MEASURED]
    assert not missing("| `alpha` | 3 |\n")
