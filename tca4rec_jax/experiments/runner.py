"""A grid from what is there to what is wanted, by one process or several beside each other.

A job is claimed by a lease in W/claims, so that any number of processes, on any hosts that share W,
work on one grid; what has a line is not done again.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

from absl import logging
from jax.errors import JaxRuntimeError

from tca4rec_jax.errors import UserError, one_line
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.choice import wanted
from tca4rec_jax.experiments.costs import Costs, Ranked
from tca4rec_jax.experiments.grid import Grid
from tca4rec_jax.experiments.results import Line, read_lines
from tca4rec_jax.experiments.work import Job, Work, as_jobs
from tca4rec_jax.fileio import fingerprint, remove
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.reporting import show, show_table
from tca4rec_jax.training.fault_tolerance import Stopped

_WAIT = 5.0  # seconds before looking again at what other processes do
_KNOWN = (FileNotFoundError, UserError, FloatingPointError, JaxRuntimeError)
"""Errors whose message is enough; JAX: out of the device's memory, for one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a grid stands."""

    cells: Cells
    done: list[Ranked]
    missing: list[Ranked]
    lines: dict[Ranked, Line]

    @classmethod
    def of(cls, cells: Cells, stale: Collection[str] = ()) -> "Plan":
        """Of the lines of W; those with a stale key do not count."""
        read = read_lines(cells.workdir)
        lines = {of: line for of, line in read.items() if line.key not in stale}
        ranked = wanted(cells, {of: line.metrics for of, line in lines.items()}).ranked
        done = [of for of in ranked if of in lines]
        missing = [of for of in ranked if of not in lines]
        return cls(cells, done, missing, lines)

    @property
    def to_follow(self) -> list[Ranked]:
        """What is known once choices can be made: if cells that have no line do as well as any."""
        return self._followed[0]

    @property
    def waits(self) -> str:
        """In words, how many cells wait for a choice that other slices of a grid have to make."""
        number = self._followed[1]
        if not number:
            return ""
        seeds = ", ".join(map(str, self.cells.seeds_elsewhere))
        return f"{number} wait for validation rows of seeds that this slice is without: {seeds}"

    @cached_property
    def _followed(self) -> tuple[list[Ranked], int]:
        """(what follows, how many are undecided even then)."""
        grid = self.cells.grid
        unmeasured = dict.fromkeys((grid.metric, grid.guided_metric), 0.0)
        results = {of: unmeasured | dict(line.metrics) for of, line in self.lines.items()}
        found: dict[Ranked, None] = dict.fromkeys(self.missing)
        while True:
            ranked, undecided = wanted(self.cells, results)
            new = [of for of in ranked if of not in results]
            if not new:
                return list(found)[len(self.missing) :], undecided
            found |= dict.fromkeys(new)
            results |= dict.fromkeys(new, unmeasured)

    @property
    def to_come(self) -> int:
        """How many follow."""
        return len(self.to_follow)

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing, and nothing waits for another slice."""
        return not self.missing and not self.to_come and not self.waits


def run_grid(grid: Grid, workdir: Path, *, minutes: float = 0.0, anew: bool = False) -> None:
    """Does what is missing of a grid.

    Before, it says what is missing and what that will cost, in the end what is missing still. A
    line of results that was made from other inputs than those that are here is said, and counts;
    with `anew` it does not. A cell that fails, whatever it raises, is said and the others go on.
    After so many `minutes` (0: no limit) the process stops as at SIGTERM: training saves its state.

    Raises UserError for a grid or config that is not valid, and in the end if a cell has failed;
    SystemExit or Stopped at SIGTERM.
    """
    cells = Cells(grid, workdir)
    cells.check()
    work = Work(cells, anew)
    stale: set[str] = set()
    failed: dict[str, str] = {}
    with _deadline(minutes) as is_over:
        try:
            found = _said_stale(work, Plan.of(cells))
            stale |= found if anew else set()
            say(cells, Plan.of(cells, stale))
            _work_off(work, stale, failed)
        except (Stopped, SystemExit):
            if not is_over():
                raise
            logging.info("%g minutes are over", minutes)
    say(cells, Plan.of(cells, stale))
    if failed:
        said = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise UserError(f"{len(failed)} jobs have failed: {said}")


def _work_off(work: Work, stale: Collection[str], failed: dict[str, str]) -> None:
    """Does job after job until none is left but those that failed."""
    cells = work.cells
    while True:
        jobs = [job for job in as_jobs(Plan.of(cells, stale).missing) if job.name not in failed]
        if not jobs:
            return
        for job in jobs:
            if _done(work, job, stale, failed):
                _clean(cells, stale)
                break
        else:
            time.sleep(_WAIT)  # other processes do all of them


def _done(work: Work, job: Job, stale: Collection[str], failed: dict[str, str]) -> bool:
    """Whether this process has done the job, or tried to; not if another one does it."""
    try:
        with only_writer(work.workdir / "claims" / fingerprint(job.name)[:16]):
            there = Plan.of(work.cells, stale).lines
            if any((cell, job.split) in there for cell in job.cells):
                return True  # another process has done it, or a part, since the plan was made
            work.do(job)
    except LeaseError as busy:
        logging.debug("%s", busy)
        return False
    except Stopped:
        raise
    except Exception as error:  # whatever it is, the other jobs may be done
        known = isinstance(error, _KNOWN)
        why = str(error) if known else f"{type(error).__name__}: {error}"
        failed[job.name] = one_line(why, 300)
        logging.error("%s failed: %s", job.name, failed[job.name], exc_info=not known)
    return True


def _clean(cells: Cells, stale: Collection[str]) -> None:
    """Deletes the checkpoints of runs that nothing needs any more; their logs stay.

    Those of a run that another process writes stay as well.
    """
    plan = Plan.of(cells, stale)
    if cells.grid.keep_checkpoints or plan.to_come or plan.waits:
        return
    needed = {cells.run_name(cell) for cell, _ in plan.missing if cell.is_llm}
    done = {cells.run_name(cell): cell for cell, _ in plan.done if cell.is_llm}
    for name in done.keys() - needed:
        run = cells.run_folder(done[name])
        if run.checkpoints.exists():
            with contextlib.suppress(LeaseError), only_writer(run.path):
                remove(run.checkpoints)


def _said_stale(work: Work, plan: Plan) -> set[str]:
    """The keys of lines made from other inputs than those that are here, after saying why.

    Also of lines that the grid does not choose now: it may once the others are computed anew.
    """
    found, here = set(), {*work.cells.all}
    for of in (of for of in plan.lines if of[0] in here):
        line, what = plan.lines[of], f"{of[0].label}, {of[1]}"
        if not (work.workdir / of[0].data / "data").exists():
            continue  # results alone were brought here
        try:
            changed = work.changed(line)
        except (OSError, UserError) as error:
            show(f"not checked: {what}: {error}", error=True)
            continue
        if changed:
            found.add(line.key)
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            show(f"stale: {what}: {'; '.join(changed[:3])}{more}", error=True)
    if found:
        show(f"{len(found)} results are stale: --anew computes them anew", error=True)
    return found


def say(cells: Cells, plan: Plan) -> None:
    """Prints what is done and missing of a grid, and what that will cost."""
    costs = Costs.of(plan.lines.values(), cells)
    table = costs.table(plan.done, plan.missing, plan.to_follow)
    show_table(table, title="The grid", first_column="cells")
    lines = [f"{len(plan.done)} cells are done, {len(plan.missing)} are missing"]
    if plan.to_come:
        lines.append(f"{plan.to_come} more follow once values are chosen on the validation split")
    if plan.waits:
        lines.append(plan.waits)
    if plan.missing or plan.is_done:
        lines += costs.in_words(plan.missing, plan.to_follow)
    show(*lines)


@contextlib.contextmanager
def _deadline(minutes: float) -> Iterator:
    """Sends SIGTERM to this process after so many minutes (0: never); gives whether it has."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(minutes * 60, stop)
    timer.daemon = True
    if minutes:
        timer.start()
    try:
        yield over.is_set
    finally:
        timer.cancel()
