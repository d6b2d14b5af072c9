"""Loading a checkpoint in a process of its own: the host holds it once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "benchmarks" / "load.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_loading_takes_little_more_memory_than_the_parameters():
    command = [sys.executable, str(SCRIPT), "--gigabytes=0.3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    times = re.search(r"([\d.]+) times the files", done.stdout)
    assert 0.9 < float(times[1]) < 1.3, done.stdout


def test_made_interactions_are_prepared_and_measured(tmp_path):
    script = SCRIPT.with_name("data.py")
    flags = ["--interactions=4000", "--users=90", "--items=60", "--source=amazon_2018"]
    command = [sys.executable, str(script), *flags, f"--folder={tmp_path / 'made'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["interactions"] == 4000
    assert found["seconds"] > 0
    assert 0.1 < found["peak_gb"] < 2
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_there_is_not_deleted_by_a_benchmark(tmp_path):
    (tmp_path / "mine").write_text("")
    command = [sys.executable, str(SCRIPT.with_name("data.py")), f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"{tmp_path} exists already: name a new one")
    assert (tmp_path / "mine").exists()


def test_wide_beams_are_timed_and_their_lists_compared(tmp_path):
    flags = ["--architecture=smollm2-135m", "--layers=1", "--dtype=float32", "--repeats=2"]
    flags += ["--items=500", "--codes=8", "--cases=2x16x4", "--attention=xla,xla"]
    output = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT.with_name("wide_beams.py")), *flags]
    done = subprocess.run(
        [*command, f"--output={output}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (numbers,) = json.loads(output.read_text()).values()
    assert min(numbers["ms"], numbers["of prompts"], numbers["of search"]) > 0
    assert numbers["places"] == 1
    assert numbers["scores apart"] == 0
