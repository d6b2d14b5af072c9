"""docs/trust.md: it has every finding, and every test that it names is there."""

import re

import pages

TRUST = (pages.ROOT / "docs" / "trust.md").read_text()

NUMBERS = {
    "A": range(1, 6),
    "B": range(1, 21),
    "C": range(1, 18),
    "D": range(1, 8),
    "newcomer ": range(1, 7),
    "newcomer hurts ": range(1, 15),
    "public B0": (1, 2, 3, 4, 5, 6, 8, 9),
    "public B": (10, 11, 12, 13, 16, 18, 19, 21, 22, 24, 26, 27, 28),
}
FINDINGS = {*"EFGHIJ"} | {f"{name}{n}" for name, numbers in NUMBERS.items() for n in numbers}


def named_findings(text):
    """Those of the first column; `public B06, B21 (a part)` are public B06 and public B21."""
    for row in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE):
        group = ""
        for *words, number in map(str.split, re.sub(r"\(.*?\)", "", row).split(",")):
            group = " ".join(words) or group
            yield f"{group} {number}".strip()


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


def test_every_finding_has_a_row():
    assert FINDINGS - {*named_findings(TRUST)} == set()


def test_every_test_that_the_page_names_is_there():
    assert missing(TRUST) == []


def test_a_test_that_is_not_there_is_found():
    row = "| A1 | x | `tests/docs/test_trust.py::test_nothing`, `::missing`, `::gone` |"
    expected = ["tests/docs/test_trust.py::test_nothing", "tests/docs/test_trust.py::gone"]
    assert missing(row) == expected
