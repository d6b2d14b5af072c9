"""The train loop: batches in, checkpoints and a log out; resumes where it stopped."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging

from tca4rec_jax.distributed.multihost import check_processes_agree
from tca4rec_jax.distributed.sharding import shard_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.fault_tolerance import Stopped, StopSignal, Watchdog
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.step import Metrics, TrainState
from tca4rec_jax.training.throughput import Peak

TrainStep = Callable[[TrainState, object], tuple[TrainState, Metrics]]
_NAMED = 8  # offending rows that a message lists


def train(
    train_step: TrainStep,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    *,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    checkpoint_every: int,
    log_path: Path,
    identity: dict,
    name: str = "train",
    flops_per_token: float,
    peak: Peak,
    profile_steps: tuple[int, int] = (0, 0),
    watchdog_seconds: float = 0.0,
    describe: Callable[[int], str] = "example {}".format,
) -> TrainState:
    """Runs until `total_steps` updates are done and the last state is saved.

    Resume order: the run's own latest checkpoint that can be read, else the given state.  Step n
    reads batch n, so the data position is the step.  Metrics of step n are fetched after step n + 1
    is dispatched.  All processes of a job call this alike; the first writes the log.

    Args:
      train_step: (state, device batch) -> (state, metrics). If its loss or gradient is not finite
        it halts: see make_train_step.
      checkpoints: closed in the end.
      identity: JSON-serialisable, saved with every checkpoint: what must be the same when the run
        goes on (the objective, say).
      log_path: JSON lines, one per step: step, loss, nll_per_title, grad_norm, tokens (real ones),
        seconds, mfu (throughput.py).
      flops_per_token: useful ones, against `peak`.
      profile_steps: steps [first, last) are recorded by jax.profiler in `profile` beside the log.
      watchdog_seconds: a step that takes longer ends the process (guards.Watchdog); 0: none does.
      describe: an example's number -> what it is in the data, for messages.

    Raises:
      FloatingPointError: a loss or gradient that is not finite; names the step and the rows. The
        state before that step is saved.
      Stopped: on SIGTERM, when the step in hand is done and its state saved.
      UserError: the checkpoint has another identity; names what differs.
      CheckpointError: a checkpoint can't be written; the one before is intact.
    """
    with checkpoints:
        latest = checkpoints.latest_step
        check_processes_agree(str(latest).encode().ljust(16), f"checkpoints in {log_path.parent}")
        if latest is not None:
            state, position = checkpoints.restore(state)
            _check_identity(position["identity"], identity, log_path.parent)
        start = done = saved = int(state.step)
        batches.complete(start, total_steps)
        log = TrainingLog(
            log_path,
            start=start,
            total_steps=total_steps,
            ideal_seconds_per_token=flops_per_token / peak.flops,
            name=name,
        )
        profile = _Profile(log_path.parent / "profile", *profile_steps)
        watchdog = Watchdog(watchdog_seconds, name, start)

        def save(state: TrainState, step: int) -> None:
            position = {"identity": identity, "next_batch": step}
            checkpoints.save(state, position, log.mean_loss())
            watchdog.progress(step)

        def finish(step: int, metrics: Metrics) -> None:
            """Waits for a step; state is that after this one or the next."""
            metrics = log.write(step, metrics, batches.tokens(step))
            watchdog.progress(step + 1)
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
                if step > saved:
                    save(state._replace(step=-1 - state.step), step)
                rows = _offending_rows(train_step, state, batches, mesh, step, describe)
                raise FloatingPointError(
                    f"step {step} has the loss {metrics.loss} and a gradient of norm "
                    f"{metrics.grad_norm}: {rows}. "
                    f"{'The state before it is saved: look' if step else 'Look'} at these rows, or "
                    "lower optimizer.learning_rate under another --config.run"
                )

        with StopSignal() as stop, watchdog, log, profile:
            pending = None
            for step, batch in enumerate(batches.iterator(start, total_steps), start):
                if stop.requested(step):
                    break
                profile.at(step, state)
                state, metrics = train_step(state, shard_batch(mesh, batch))
                done = step + 1
                if pending is not None:
                    finish(*pending)
                pending = step, metrics
                checkpoints.check()
                if done % checkpoint_every == 0 and done < total_steps:
                    finish(*pending)
                    pending = None  # no checkpoint before its loss was seen to be finite
                    save(state, done)
                    saved = done
            if pending is not None:
                finish(*pending)
            if done > saved:
                save(state, done)
            checkpoints.close()
    if done < total_steps:
        raise Stopped(
            f"SIGTERM: stopped after step {done} of {total_steps}, which is saved in "
            f"{log_path.parent}; the same command goes on from there"
        )
    if summary := log.summary():
        logging.info("%s: %s of %.3g FLOP/s (%s)", name, summary, peak.flops, peak.source)
    return state


def _offending_rows(
    train_step: TrainStep, halted: TrainState, batches: Batches, mesh, step: int, describe
) -> str:
    """Which rows of a batch have a loss or gradient that is not finite, each tried alone.

    `halted` is used up; such a state is not updated, so every row meets the same parameters.
    """
    rows, bad = batches.rows(step), []
    for place in range(rows.size):
        halted, metrics = train_step(halted, shard_batch(mesh, batches.alone(step, place)))
        if not (math.isfinite(float(metrics.loss)) and math.isfinite(float(metrics.grad_norm))):
            bad.append(place)
    if not bad:
        return f"no row alone is to blame, the batch is {_listed(rows, describe)}"
    if len(bad) == rows.size > 1:
        return f"every row of the batch is to blame ({_listed(rows, describe)})"
    return f"to blame is {_listed(rows[bad], describe)}"


def _listed(examples: np.ndarray, describe) -> str:
    more = examples.size - _NAMED
    return "; ".join(map(describe, examples[:_NAMED].tolist())) + (
        f" and {more} more" if more > 0 else ""
    )


def _check_identity(saved: dict, wanted: dict, directory: Path) -> None:
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differ = [key for key in wanted if saved.get(key) != wanted[key]]
    if differ:
        values = "; ".join(f"{key} was {saved.get(key)}, now {wanted[key]}" for key in differ)
        raise UserError(
            f"{directory} was trained otherwise ({values}): give this run another name with "
            "--config.run, or delete the directory"
        )


class _Profile:
    """Records steps [first, last) with jax.profiler; nothing if there are none."""

    def __init__(self, directory: Path, first: int, last: int):
        self._directory, self._first, self._last = directory, first, last
        self._running = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def at(self, step: int, state: TrainState) -> None:
        """Before `step` is dispatched; `state` is what it starts from."""
        if self._first <= step < self._last and not self._running:
            jax.block_until_ready(state)  # the steps before are not in the window
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif step >= self._last and self._running:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
