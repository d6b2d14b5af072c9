"""docs/trust.md: every test that it names is there."""

import re

import pages

TRUST = (pages.ROOT / "docs" / "trust.md").read_text()


def named_tests(text):
    """(file, function) of every `tests/file.py::test`; `::test` is in the file named before it."""
    file = ""
    for path, name in re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", text):
        file = path or file
        yield file, name


def missing(text):
    found = []
    for file, name in named_tests(text):
        path = pages.ROOT / file
        there = path.is_file() and re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)
        if not there:
            found.append(f"{file}::{name}")
    return found


def test_every_test_that_the_page_names_is_there():
    assert missing(TRUST) == []


def test_a_test_that_is_not_there_is_found():
    row = "| A1 | x | `tests/docs/test_trust.py::test_nothing`, `::missing`, `::gone` |"
    expected = ["tests/docs/test_trust.py::test_nothing", "tests/docs/test_trust.py::gone"]
    assert missing(row) == expected
