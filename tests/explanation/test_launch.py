"""launch/explain.py from its flags to its files."""

import json
import os
from pathlib import Path

import pytest
from forked import Script
from tiny_workdir import make_workdir

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path
from tiny_workdir import make_config

def get_config(argument=None):
    return make_config(Path({workdir!r}), "any")
"""


@pytest.fixture(scope="module")
def explain(tmp_path_factory):
    """The script on a tiny work directory, with further flags."""
    path = tmp_path_factory.mktemp("explained")
    make_workdir(path)
    config = path / "tiny.py"
    config.write_text(CONFIG.format(workdir=str(path)))

    def run(*flags):
        given = (f"--config={config}", f"--workdir={path}", "--untrained", *flags)
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT / "tests")}
        return Script([str(ROOT / "launch" / "explain.py"), *given], environment).completed()

    return run


@pytest.mark.slow
def test_a_row_is_explained_on_the_terminal_and_in_files(explain, tmp_path):
    files = [f"--json={tmp_path}/why.json", f"--html={tmp_path}/why.html"]
    asked = ["--compare=aa", "--compare=11", "--guidance=2", "--k=4"]
    done = explain("--split=test", "--row=3", *asked, *files)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("What came next: ")
    told = json.loads((tmp_path / "why.json").read_text())
    assert len([one for one in told["items"] if one["place"]]) == 4
    for one in told["items"][:4]:
        assert any(line.split()[:1] == [str(one["place"])] for line in lines)
    assert any(line.startswith("Why 'aa' stands") for line in lines)
    assert (tmp_path / "why.html").read_text().lstrip().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give either --item (once or more), or --row"),
        (("--item=0", "--row=1"), "give either --item (once or more), or --row"),
        (("--row=4000",), "--row is 4000, but test has the rows 0.."),
        (("--row=1", "--compare=0"), "give --compare twice for each pair, got 1"),
    ],
)
def test_flags_that_do_not_fit_are_errors_in_one_line(explain, flags, message):
    done = explain(*flags)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"explain: {message}" in done.stderr
