"""The training loop: batches in, checkpoints and a log out; it resumes where it stopped."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging

from tca4rec_jax.distributed.multihost import check_processes_agree
from tca4rec_jax.errors import UserError
from tca4rec_jax.trackers import Trackers
from tca4rec_jax.training.batches import Batch, Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.fault_tolerance import Stopped, Watchdog, stop_signal
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.state import Metrics, TrainState
from tca4rec_jax.training.throughput import Peak, ProfilerWindow
from tca4rec_jax.training.validation import Outcome, Validation

# (state, batch of this process' rows) -> (state, metrics)
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
_NAMED = 8  # offending rows that a message lists


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Where and how long the loop runs."""

    directory: Path  # of the run, named like it: for the log (log.jsonl) and the profile (profile/)
    total_steps: int  # the number of updates, those before a resume included
    checkpoint_every: int  # steps
    inputs: str  # what the run is made from (provenance), saved with every checkpoint
    flops_per_token: float  # useful ones; the log's MFU compares them with `peak`
    peak: Peak
    profile_steps: tuple[int, int] = (0, 0)  # jax.profiler records steps [first, last)
    watchdog_seconds: float = 0.0  # a step that takes longer ends the process; 0: no limit
    describe: Callable[[int], str] = "example {}".format  # an example's row and user
    validation: Validation | None = None
    open_trackers: Callable[[int], Trackers] = lambda start: Trackers()


def run_loop(
    train_step: TrainStep,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    options: LoopOptions,
) -> TrainState:
    """Runs until `total_steps` updates are done or validation ends it; the last state is saved.

    Resume order: the run's own latest readable checkpoint, else the given state.  Step n reads
    batch n, so the data position is the step.  Metrics of step n are fetched after step n + 1 is
    dispatched.  All processes of a job call this alike; the first writes the log: JSON lines, one
    per step: step, loss, nll_per_title, grad_norm, tokens (without padding), seconds, mfu; and one
    per validation. A state is saved, then validated: a validation that was cut short begins anew
    with the next start. The checkpoints are closed in the end.

    Raises FloatingPointError for a loss or gradient that is not finite, naming step and rows: the
    state before is saved; Stopped on SIGTERM, after the current step is saved, also during a
    validation; UserError for a checkpoint of other inputs; CheckpointError if none can be written:
    the last is intact.
    """
    directory, total = options.directory, options.total_steps
    with checkpoints:
        state = _resumed(state, checkpoints, options)
        start = done = int(state.step)
        batches.fill_cache(start, total)
        trackers = options.open_trackers(start)
        log = _opened_log(options, start, trackers)
        watchdog = Watchdog(options.watchdog_seconds, directory.name, start)
        profile = ProfilerWindow(directory / "profile", *options.profile_steps)
        with stop_signal() as stop_requested, trackers, log, profile:
            progress = _Progress(
                train_step, batches, checkpoints, options, log, watchdog, start, stop_requested
            )
            with watchdog:
                for step, batch in enumerate(batches.iterator(start, total), start):
                    if stop_requested() or not progress.validated(state, step):
                        break
                    if progress.outcome.ended:
                        break
                    profile.at(step, state)
                    state, metrics = train_step(state, batch)
                    progress.finish(state)
                    progress.pending, done = (step, metrics), step + 1
                    checkpoints.check()
                    if done % options.checkpoint_every == 0 and done < total:
                        progress.save(state, done)
                progress.finish(state)
                over = done == total and progress.validated(state, done)
            if done > progress.saved:
                progress.save(state, done)
            checkpoints.close()  # takes as long as it takes to write
    outcome = progress.outcome
    if not over and not outcome.ended:
        raise Stopped(
            f"SIGTERM: stopped after step {done} of {total}, which is saved in {directory}; the "
            "same command goes on from there"
        )
    _say_the_end(options, done, outcome, log.summary())
    return state


def _opened_log(options: LoopOptions, start: int, trackers: Trackers) -> TrainingLog:
    return TrainingLog(
        options.directory / "log.jsonl",
        start=start,
        total_steps=options.total_steps,
        ideal_seconds_per_token=options.flops_per_token / options.peak.flops,
        name=options.directory.name,
        trackers=trackers,
    )


def _say_the_end(options: LoopOptions, done: int, outcome: Outcome, speed: str) -> None:
    name, steps = options.directory.name, f"{done} of {options.total_steps} steps"
    if outcome.best is not None:
        gains = f"{steps}, {outcome.without_gain} validations without a gain"
        gains += ", which end the run" if outcome.ended else ""
        logging.info("%s: the best step is %d (%s)", name, outcome.best, gains)
    if speed:
        logging.info("%s: %s of %.3g FLOP/s (%s)", name, speed, *options.peak)


def _resumed(state: TrainState, checkpoints: Checkpoints, options: LoopOptions) -> TrainState:
    """The latest readable checkpoint; `state` if there is none. Raises UserError as `run_loop`."""
    latest = checkpoints.latest_step
    check_processes_agree(str(latest), f"checkpoints in {options.directory}")
    if latest is None:
        return state
    state, position = checkpoints.restore(state)
    if position["inputs"] != options.inputs:
        raise UserError(
            f"{options.directory}: the checkpoint is of another run: give this one another name "
            "with --config.run, or delete the directory"
        )
    return state


class _AskedToStop(Exception):
    """In the middle of a validation."""


@dataclasses.dataclass
class _Progress:
    """Finishes, saves and validates the steps of a loop."""

    train_step: TrainStep
    batches: Batches
    checkpoints: Checkpoints
    options: LoopOptions
    log: TrainingLog
    watchdog: Watchdog
    saved: int  # the step of the newest checkpoint
    stop_requested: Callable[[], bool]
    pending: tuple[int, Metrics] | None = None  # the step whose metrics are not fetched yet
    outcome: Outcome = Outcome()  # of the validations so far

    def __post_init__(self):
        if self.options.validation is not None:
            found = self.log.validations
            check_processes_agree(repr(sorted(found.items())), "validations in the run's log")
            self._draw_conclusions()

    def save(self, state: TrainState, step: int) -> None:
        """Starts a checkpoint of `state`, after `step` updates whose loss was seen to be finite."""
        self.finish(state)
        position = {"inputs": self.options.inputs, "next_batch": step}
        every, last = self.options.checkpoint_every, self.options.total_steps
        regular = step % every == 0 or step == last  # others are there by chance, or are validated
        loss = self.log.mean_loss(step, every) if regular else math.inf
        self.checkpoints.save(state, position, loss)
        self.watchdog.progress(step)
        self.saved = step

    def finish(self, state: TrainState) -> None:
        """Waits for the pending step and logs it; `state` is the one after this step or the next.

        Raises FloatingPointError as `run_loop`.
        """
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        metrics = self.log.write(step, metrics, self.batches.tokens(step))
        self.watchdog.progress(step + 1)
        if _finite(metrics):
            return
        if step > self.saved:
            self.save(state._replace(step=-1 - state.step), step)
        raise FloatingPointError(
            f"step {step} has the loss {metrics.loss} and a gradient of norm "
            f"{metrics.grad_norm}: {self._offending_rows(state, step)}. "
            f"{'The state before it is saved: look' if step else 'Look'} at these rows, or "
            "lower optimizer.learning_rate under another --config.run"
        )

    def validated(self, state: TrainState, step: int) -> bool:
        """Saves and validates the state after `step` updates if that is due and not in the log yet.

        Returns False if it was asked to stop meanwhile.
        """
        validation, last = self.options.validation, self.options.total_steps
        if validation is None or not step or step in self.log.validations:
            return True
        if step % validation.every and step != last:
            return True
        if step > self.saved:
            self.save(state, step)
        try:
            found = validation.metrics_of(state, partial(self._after_batch, step))
        except _AskedToStop:
            return False
        self.log.write_validation(step, found, validation.config.metric)
        self.watchdog.progress(step)
        self._draw_conclusions()
        return True

    def _after_batch(self, step: int) -> None:
        """Called by a validation."""
        self.watchdog.progress(step)
        if self.stop_requested():
            raise _AskedToStop

    def _draw_conclusions(self) -> None:
        assert self.options.validation is not None
        self.outcome = Outcome.of(self.options.validation.config, self.log.validations)
        self.checkpoints.best = self.outcome.best

    def _offending_rows(self, halted: TrainState, step: int) -> str:
        """The rows of a batch whose loss or gradient is not finite, each tried alone.

        `halted` is used up; such a state is not updated, so every row meets the same parameters.
        """
        rows, bad = self.batches.rows(step), []
        for row in range(rows.size):
            halted, metrics = self.train_step(halted, self.batches.alone(step, row))
            self.watchdog.progress(step)
            if not _finite(metrics):
                bad.append(row)
        if not bad:
            return f"no row alone is to blame, the batch is {self._listed(rows)}"
        if len(bad) == rows.size > 1:
            return f"every row of the batch is to blame ({self._listed(rows)})"
        return f"to blame is {self._listed(rows[bad])}"

    def _listed(self, examples: np.ndarray) -> str:
        named = "; ".join(map(self.options.describe, examples[:_NAMED].tolist()))
        more = examples.size - _NAMED
        return f"{named} and {more} more" if more > 0 else named


def _finite(metrics: Metrics) -> bool:
    return math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
