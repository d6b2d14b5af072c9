"""The order of jobs, failures, other processes: with work that only writes lines."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments import runner
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.page_grid import missing
from tca4rec_jax.experiments.results import FILE, Line, append, read_lines
from tca4rec_jax.experiments.runner import Plan, run_grid
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.training.fault_tolerance import CheckpointError, Stopped

TINY = Path(__file__).parents[2] / "configs" / "experiments" / "tiny.py"


class FakeWork:
    """Writes a line for every cell of a job; `before` is called first."""

    version = ""

    def __init__(self, cells, anew):
        self.cells, self.workdir, self.anew = cells, cells.workdir, anew
        self.done = []

    def before(self, job):
        """Nothing."""

    def score(self, cell):
        return cell.alpha or 0.0

    def do(self, job):
        self.before(job)
        self.done.append(job.name)
        for cell in job.cells:
            key = f"{cell.label} {job.split} {self.version or self.anew}"
            metrics = {"ndcg@10": self.score(cell), "nll per title": 1.0}
            seconds = {"train": 12.0 if cell.is_llm else 0.0, "evaluate": 6.0}
            line = Line(key, cell, job.split, 1, 1, metrics, "", seconds, 18.0, "m", {})
            append(self.workdir, line)

    def changed(self, line):
        return [] if line.key.endswith("True") else ["alpha was 1, is 2"]


@pytest.fixture
def work(monkeypatch):
    """The class of the work; what is set on it counts for `run_grid`."""
    kind = type("Work", (FakeWork,), {})
    monkeypatch.setattr(runner, "Work", kind)
    monkeypatch.setattr(runner, "_WAIT", 0.01)
    return kind


def test_every_cell_gets_one_line(tmp_path, work, capsys):
    grid = load_grid(str(TINY))
    run_grid(grid, tmp_path)
    lines = read_json_lines(tmp_path / FILE)
    assert len(lines) == len(read_lines(tmp_path)) == 25
    assert {line["cell"]["alpha"] for line in lines if line["split"] == "test"} == {None, 0.0, 0.9}
    assert "Nothing is missing" in capsys.readouterr().out
    run_grid(grid, tmp_path)
    assert len(read_json_lines(tmp_path / FILE)) == 25


def test_a_cell_that_fails_is_said_and_the_others_go_on(tmp_path, work):
    def before(self, job):
        if job.cells[0].alpha == 0.3:
            raise FloatingPointError("the loss is nan")

    work.before = before
    with pytest.raises(UserError, match=r"2 jobs have failed: movielens ids .*alpha=0\.3.* is nan"):
        run_grid(load_grid(f"{TINY}:guidance=0"), tmp_path)
    assert {cell.alpha for cell, _ in read_lines(tmp_path)} == {None, 0.0, 0.9}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("CF logits contain NaN"), "ValueError: CF logits contain NaN"),
        (CheckpointError("step 3 is damaged"), "CheckpointError: step 3 is damaged"),
        (MemoryError(), "MemoryError:"),
        (OSError(28, "No space left on device"), "OSError: .* No space left on device"),
    ],
)
def test_whatever_a_cell_raises_the_others_go_on(tmp_path, work, error, said, monkeypatch):
    def before(self, job):
        if job.cells[0].alpha == 0.3:
            raise error

    work.before = before
    traces = []
    monkeypatch.setattr(runner.logging, "error", lambda *_, exc_info: traces.append(exc_info))
    with pytest.raises(UserError, match=rf"2 jobs have failed: movielens ids .*alpha=0\.3.*{said}"):
        run_grid(load_grid(f"{TINY}:guidance=0"), tmp_path)
    assert {cell.alpha for cell, _ in read_lines(tmp_path)} == {None, 0.0, 0.9}
    assert traces == [True, True]


@pytest.mark.parametrize("end", [Stopped("saved"), SystemExit(143), KeyboardInterrupt()])
def test_a_grid_that_is_asked_to_stop_stops(tmp_path, work, end):
    def before(self, job):
        if self.done:
            raise end

    work.before = before
    with pytest.raises(type(end)):
        run_grid(load_grid(str(TINY)), tmp_path)
    assert len(read_lines(tmp_path)) == 1


def test_the_minutes_that_are_given_begin_before_results_are_checked(tmp_path, work, monkeypatch):
    """A stand-in for SIGTERM's handler, which `launching.start` sets."""
    grid = load_grid(f"{TINY}:seed=0,alpha=0.3")
    run_grid(grid, tmp_path)
    (tmp_path / "movielens" / "data").mkdir(parents=True)
    checked = []

    def changed(self, line):
        checked.append(line)
        time.sleep(0.05)
        return []

    work.changed = changed
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_grid(grid, tmp_path, minutes=0.02 / 60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(checked) == 1 < len(read_lines(tmp_path))


def test_what_another_process_makes_is_tried_again_later(tmp_path, work):
    tried = []

    def before(self, job):
        tried.append(job.name)
        if tried.count(job.name) == 1:
            raise LeaseError("busy")

    work.before = before
    run_grid(load_grid(f"{TINY}:seed=0"), tmp_path)
    assert all(tried.count(name) == 2 for name in tried)
    assert len(read_json_lines(tmp_path / FILE)) == len(read_lines(tmp_path))


def test_what_has_been_done_since_the_plan_is_not_done_again(tmp_path, work):
    other = FakeWork(Cells(load_grid(str(TINY)), tmp_path), False)
    cells = other.cells
    jobs = runner.as_jobs(Plan.of(cells).missing)
    other.do(jobs[3])
    mine = FakeWork(cells, False)
    assert runner._done(mine, jobs[3], (), {})
    assert mine.done == []


def test_a_claim_is_the_same_whichever_cells_of_a_job_are_missing(tmp_path):
    cells = Cells(load_grid(f"{TINY}:alpha=0.3,seed=0"), tmp_path)
    llm = [(cell, "test") for cell in cells.all if cell.is_llm and cell.cf == "bpr_mf"]
    names = [runner.as_jobs(part)[0].name for part in (llm, llm[:1], llm[1:])]
    assert len(llm) == 2
    assert len({*names}) == 1


def test_stale_lines_count_unless_they_are_wanted_anew(tmp_path, work, capsys):
    grid = load_grid(f"{TINY}:seed=0")
    run_grid(grid, tmp_path)
    (tmp_path / "movielens" / "data").mkdir(parents=True)
    before = len(read_json_lines(tmp_path / FILE))
    run_grid(grid, tmp_path)
    assert len(read_json_lines(tmp_path / FILE)) == before
    said = capsys.readouterr().err
    assert said.count("alpha was 1, is 2") == before
    assert f"{before} results are stale: --anew computes them anew" in said
    run_grid(grid, tmp_path, anew=True)
    assert len(read_json_lines(tmp_path / FILE)) == 2 * before
    assert all(line.key.endswith("True") for line in read_lines(tmp_path).values())


def test_a_stale_line_does_not_count_when_it_is_chosen_again(tmp_path, work):
    """Three versions of the inputs choose 0.9, 0.3 and 0.9 again."""
    grid = load_grid(f"{TINY}:seed=0,cf=bpr_mf,guidance=0")
    (tmp_path / "movielens" / "data").mkdir(parents=True)
    for version, best in (("v1", 0.9), ("v2", 0.3), ("v3", 0.9)):
        work.version = version
        work.score = lambda self, cell, best=best: float(cell.alpha == best)
        work.changed = lambda self, line, of=version: [] if line.key.endswith(of) else ["other"]
        run_grid(grid, tmp_path, anew=True)
    plan = Plan.of(Cells(grid, tmp_path))
    assert {(cell.alpha, split) for cell, split in plan.done} >= {(0.9, "test")}
    assert {plan.lines[of].key.rpartition(" ")[2] for of in plan.done} == {"v3"}


def test_checkpoints_go_when_nothing_needs_them(tmp_path, work):
    grid = load_grid(f"{TINY}:seed=0,cf=bpr_mf")
    cells = Cells(grid, tmp_path)
    kept = []

    def before(self, job):
        if job.cells[0].is_llm:
            cells.run_folder(job.cells[0]).checkpoints.mkdir(parents=True, exist_ok=True)
        kept.append(len([*tmp_path.rglob("checkpoints")]))

    work.before = before
    run_grid(grid, tmp_path)
    assert max(kept) == 3
    assert not [*tmp_path.rglob("checkpoints")]


def test_a_slice_that_waits_for_anothers_choice_says_so_and_keeps_its_checkpoints(
    tmp_path, work, capsys
):
    first, later = (load_grid(f"{TINY}:seed={seed},cf=bpr_mf,guidance=0") for seed in (0, 1))

    def before(self, job):
        if job.cells[0].is_llm:
            self.cells.run_folder(job.cells[0]).checkpoints.mkdir(parents=True, exist_ok=True)

    work.before = before
    run_grid(later, tmp_path)
    plan = Plan.of(Cells(later, tmp_path))
    assert (plan.missing, plan.to_come, plan.is_done) == ([], 0, False)
    waits = "1 wait for validation rows of seeds that this slice is without: 0"
    assert missing(plan)[0].text == f"0 cells of the grid; {waits}."
    said = capsys.readouterr().out
    assert said.endswith(f"5 cells are done, 0 are missing\n{waits}\n")
    assert len([*tmp_path.rglob("checkpoints")]) == 1
    for grid in (first, later):
        run_grid(grid, tmp_path)
        assert Plan.of(Cells(grid, tmp_path)).is_done
        assert capsys.readouterr().out.endswith("Nothing is missing\n")
    assert not [*tmp_path.rglob("checkpoints")]


def test_checkpoints_of_a_run_that_another_process_writes_stay(tmp_path, work):
    grid = load_grid(f"{TINY}:seed=0,cf=bpr_mf,guidance=0")
    run_grid(grid, tmp_path)
    cells = Cells(grid, tmp_path)
    runs = [cells.run_folder(cell) for cell in cells.all if cell.is_llm]
    for run in runs:
        run.checkpoints.mkdir(parents=True)
    with only_writer(runs[0].path):
        runner._clean(cells, ())
    assert [run.checkpoints.exists() for run in runs] == [True] + [False] * (len(runs) - 1)


def test_a_job_that_another_process_has_claimed_is_left_to_it(tmp_path):
    work = FakeWork(Cells(load_grid(str(TINY)), tmp_path), False)
    job = runner.as_jobs(Plan.of(work.cells).missing)[0]
    with only_writer(tmp_path / "claims" / runner.fingerprint(job.name)[:16]):
        assert not runner._done(work, job, (), {})
    assert runner._done(work, job, (), {})
    assert work.done == [job.name]
