"""What --help of every launch script says."""

import ast
import os
import re
from pathlib import Path

import pytest
from forked import Script

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("[!_]*.py"))


def missing(script: str, text: str) -> list[str]:
    """What a description lacks: an example, what is read, what is written."""
    wanted = {
        "an example": rf"^    python launch/{script} .*--\w+=",
        "what it reads": r"\bReads\s",
        "what it writes": r"\bWrites\s",
    }
    return [what for what, as_in in wanted.items() if not re.search(as_in, text, re.MULTILINE)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_it_reads_and_writes_and_gives_an_example(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not missing(path.name, text)
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_missing_is_found():
    assert missing("x.py", "Does x.\n\nReads all.") == ["an example", "what it writes"]


@pytest.mark.parametrize("script", ["train", "status"])
def test_help_shows_it_and_the_flags_that_count(script):
    path = ROOT / f"launch/{script}.py"
    done = Script([str(path), "--help"], dict(os.environ)).completed()
    assert (done.returncode, done.stderr) == (0, "")
    assert (ast.get_docstring(ast.parse(path.read_text())) or "-") in done.stdout
    assert "--[no]quiet" in done.stdout
    assert ("--config:" in done.stdout) == (script == "train")


def test_a_script_without_a_config_ends_in_one_line(tmp_path):
    """Not with a flag that it does not have, nor without one that it needs."""
    for flags, line in (
        (["--config=x", f"--workdir={tmp_path}"], "status: Unknown command line flag 'config'"),
        ([], "status: give --workdir (--help says what for)"),
        ([f"--workdir={tmp_path}/x"], f"status: {tmp_path}/x: no such work directory"),
    ):
        done = Script([f"{ROOT}/launch/status.py", *flags], dict(os.environ)).completed()
        assert (done.returncode, done.stderr, done.stdout) == (1, line + "\n", "")
