"""The training loop: batches in, checkpoints and a log out; it resumes where it stopped."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging

from tca4rec_jax.distributed.multihost import check_processes_agree
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.batches import Batch, Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.fault_tolerance import Stopped, Watchdog, stop_signal
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.state import Metrics, TrainState
from tca4rec_jax.training.throughput import Peak, ProfilerWindow

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


def run_loop(
    train_step: TrainStep,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    options: LoopOptions,
) -> TrainState:
    """Runs until `total_steps` updates are done and the last state is saved.

    Resume order: the run's own latest readable checkpoint, else the given state.  Step n reads
    batch n, so the data position is the step.  Metrics of step n are fetched after step n + 1 is
    dispatched.  All processes of a job call this alike; the first writes the log: JSON lines, one
    per step: step, loss, nll_per_title, grad_norm, tokens (without padding), seconds, mfu. The
    checkpoints are closed in the end.

    Raises FloatingPointError for a loss or gradient that is not finite, naming step and rows: the
    state before is saved; Stopped on SIGTERM, after the current step is saved; UserError for a
    checkpoint of other inputs; CheckpointError if none can be written: the last is intact.
    """
    directory, total = options.directory, options.total_steps
    with checkpoints:
        state = _resumed(state, checkpoints, options)
        start = done = int(state.step)
        batches.fill_cache(start, total)
        log = TrainingLog(
            directory / "log.jsonl",
            start=start,
            total_steps=total,
            ideal_seconds_per_token=options.flops_per_token / options.peak.flops,
            name=directory.name,
        )
        watchdog = Watchdog(options.watchdog_seconds, directory.name, start)
        profile = ProfilerWindow(directory / "profile", *options.profile_steps)
        progress = _Progress(train_step, batches, checkpoints, options, log, watchdog, start)
        with stop_signal() as stop_requested, log, profile:
            with watchdog:
                for step, batch in enumerate(batches.iterator(start, total), start):
                    if stop_requested(step):
                        break
                    profile.at(step, state)
                    state, metrics = train_step(state, batch)
                    progress.finish(state)
                    progress.pending, done = (step, metrics), step + 1
                    checkpoints.check()
                    if done % options.checkpoint_every == 0 and done < total:
                        progress.save(state, done)
                progress.finish(state)
            if done > progress.saved:
                progress.save(state, done)
            checkpoints.close()  # takes as long as it takes to write
    if done < total:
        raise Stopped(
            f"SIGTERM: stopped after step {done} of {total}, which is saved in {directory}; the "
            "same command goes on from there"
        )
    if summary := log.summary():
        logging.info("%s: %s of %.3g FLOP/s (%s)", directory.name, summary, *options.peak)
    return state


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


@dataclasses.dataclass
class _Progress:
    """Finishes and saves the steps of a loop."""

    train_step: TrainStep
    batches: Batches
    checkpoints: Checkpoints
    options: LoopOptions
    log: TrainingLog
    watchdog: Watchdog
    saved: int  # the step of the newest checkpoint
    pending: tuple[int, Metrics] | None = None  # the step whose metrics are not fetched yet

    def save(self, state: TrainState, step: int) -> None:
        """Starts a checkpoint of `state`, after `step` updates whose loss was seen to be finite."""
        self.finish(state)
        position = {"inputs": self.options.inputs, "next_batch": step}
        every, last = self.options.checkpoint_every, self.options.total_steps
        regular = step % every == 0 or step == last  # another is only there if it was interrupted
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
