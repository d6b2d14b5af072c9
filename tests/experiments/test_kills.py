"""A grid that is killed whenever, or done by two processes, ends as an undisturbed one."""

import dataclasses
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import tiny_grid

from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.results import FILE, VALIDATION, RowRanks, read_lines
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.training.fault_tolerance import STOPPED

SMALL = "cf=bpr_mf,alpha=(0.3,0.9),seed=0,guidance=0"


def finished(script):
    done = script.completed()
    assert done.returncode == 0, done.stderr
    return done


def num_files(workdir):
    """How far a grid is: it leaves more and more files."""
    return sum(len(files) for _, _, files in os.walk(workdir))  # they come and go meanwhile


def killed(workdir, argument, files):
    """Starts the grid and kills it once it has left so many files; whether it was in time."""
    script = tiny_grid.start(workdir, argument)
    deadline = time.monotonic() + 240
    while not script.ended and num_files(workdir) < files and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(script.pid, signal.SIGKILL)
    return script.wait() == -signal.SIGKILL


def outcomes(workdir):
    """What is the same whenever and however the cells were done."""
    found = {}
    for of, line in Results.read(workdir).lines.items():  # and the agreement of lists
        fields = dataclasses.asdict(line)
        for name in ("seconds", "core_seconds", "machine"):
            del fields[name]
        found[of] = fields
    assert len(read_json_lines(workdir / FILE)) == len(found)  # none twice
    return found


def assert_same(workdir, whole):
    assert outcomes(workdir) == outcomes(whole)
    for line in read_lines(whole).values():
        ranks = (RowRanks.read(folder / line.ranks) for folder in (workdir, whole))
        for one, other in zip(*ranks, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def argument(tmp_path_factory):
    return tiny_grid.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, argument):
    """The small grid, undisturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    finished(tiny_grid.start(workdir, f"{argument},{SMALL}"))
    return workdir


def test_a_line_holds_what_its_run_was_made_from_and_the_likelihood_of_one_temperature(whole):
    """Of validation rows the best for these rows, of test rows 1."""
    for (cell, split), line in read_lines(whole).items():
        ranks = RowRanks.read(whole / line.ranks)
        temperature = ranks.best_temperature if split == VALIDATION else 1.0
        assert line.metrics[NLL] == pytest.approx(ranks.nll_R(temperature).mean())
        assert ranks.temperature_T.tolist() == [1.0, 1.25, 1.5, 2.0, 3.0]
        if cell.is_llm:
            inputs = line.made_from.inputs
            assert (inputs["run.training.batch_size"], inputs["run.seed"]) == (4, cell.seed)


def test_killed_once_it_ends_as_if_not(tmp_path, whole, argument):
    assert killed(tmp_path, f"{argument},{SMALL}", 0.6 * num_files(whole))
    done = finished(tiny_grid.start(tmp_path, f"{argument},{SMALL}"))
    assert done.stdout.endswith("7 cells are done, 0 are missing\nNothing is missing\n")
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_as_if_not(tmp_path, whole, argument):
    given, seed = f"{argument},{SMALL}", random.randrange(10**6)
    draw = random.Random(seed)
    at = sorted(draw.uniform(0.1, 0.98) * num_files(whole) for _ in range(10))
    in_time = sum(killed(tmp_path, given, files) for files in at)
    assert in_time >= 8, f"seed {seed}"
    finished(tiny_grid.start(tmp_path, given))
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_share_the_cells_and_stop_when_asked(tmp_path, whole, argument):
    given = f"{argument},{SMALL}"
    both = tiny_grid.start(tmp_path, given, "--devices=0,1")
    while not (tmp_path / FILE).exists() and not both.ended:
        time.sleep(0.01)
    os.kill(both.pid, signal.SIGTERM)
    assert both.wait() == STOPPED, both.printed("stderr")
    logs = [(tmp_path / f"worker_{device}.log").read_text() for device in (0, 1)]
    assert "Traceback" not in "".join(logs)
    finished(tiny_grid.start(tmp_path, given, "--devices=0,1"))
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_the_time_that_is_given_is_kept(tmp_path, whole, argument):
    shutil.copytree(whole / "movielens" / "data", tmp_path / "movielens" / "data")
    done = finished(tiny_grid.start(tmp_path, f"{argument},{SMALL}", "--minutes=0.001"))
    assert "0.001 minutes are over" in done.stderr
    assert "Nothing is missing" not in done.stdout
