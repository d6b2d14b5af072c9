"""Loading a checkpoint in a process of its own: the host holds it once."""

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
