"""The train loop: batches in, checkpoints and a log out; resumes where it stopped."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from tca4rec_jax.sharding import shard_batch
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.checkpoint import Checkpoints
from tca4rec_jax.training.step import Metrics, TrainState
from tca4rec_jax.training.throughput import Peak


def train(
    train_step: Callable[[TrainState, object], tuple[TrainState, Metrics]],
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
) -> TrainState:
    """Runs until `total_steps` updates are done and the last state is saved.

    Resume order: the run's own latest checkpoint, else the given state.  Step n reads batch n, so
    the data position is the step.  Metrics of step n are fetched after step n + 1 is dispatched.

    Args:
      train_step: (state, device batch) -> (state, metrics).
      identity: JSON-serialisable, saved with every checkpoint: what must be the same when the run
        goes on (the objective, say).
      log_path: JSON lines, one per step: step, loss, nll_per_title, grad_norm, tokens (real ones),
        seconds, mfu (throughput.py).
      flops_per_token: useful ones, against `peak`.
      profile_steps: steps [first, last) are recorded by jax.profiler in `profile` beside the log.

    Raises:
      FloatingPointError: a loss that is not finite; the log names the step and the examples.
      ValueError: the checkpoint has another identity; names what differs.
    """
    if checkpoints.latest_step is not None:
        state, position = checkpoints.restore(state)
        _check_identity(position["identity"], identity, log_path.parent)
    start = int(state.step)
    log = _TrainingLog(log_path, start, batches, flops_per_token / peak.flops)
    profile = _Profile(log_path.parent / "profile", *profile_steps)
    with log, profile, tqdm(total=total_steps, initial=start, desc=name, unit="step") as bar:
        pending = None
        began = time.perf_counter()
        for step, batch in enumerate(batches.iterator(start, total_steps), start):
            profile.at(step, state)
            tokens = int(batch.length_B.sum() - np.sum(batch.weight_BxT.sum(axis=1) == 0))
            state, metrics = train_step(state, shard_batch(mesh, batch))
            if pending is not None:
                began = log.write(bar, *pending, began)
            pending = (step, metrics, tokens)
            if (step + 1) % checkpoint_every == 0 and step + 1 < total_steps:
                began = log.write(bar, *pending, began)
                pending = None  # a checkpoint only ever follows a loss that was seen to be finite
                checkpoints.save(state, {"identity": identity, "next_batch": step + 1})
        if pending is not None:
            log.write(bar, *pending, began)
    if start < total_steps:
        checkpoints.save(state, {"identity": identity, "next_batch": total_steps})
    checkpoints.close()
    if log.seconds:
        logging.info("%s: %s of %.3g FLOP/s (%s)", name, log.summary(), peak.flops, peak.source)
    return state


def _check_identity(saved: dict, wanted: dict, directory: Path) -> None:
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    differ = [key for key in wanted if saved.get(key) != wanted[key]]
    if differ:
        values = "; ".join(f"{key} was {saved.get(key)}, now {wanted[key]}" for key in differ)
        raise ValueError(
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


class _TrainingLog:
    """Appends one JSON line per step; on resume drops the lines after the checkpoint."""

    def __init__(
        self, path: Path, keep_steps: int, batches: Batches, ideal_seconds_per_token: float
    ):
        kept = [line for line in read_log(path) if line["step"] < keep_steps]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a", buffering=1)
        self._batches = batches
        self._ideal_seconds_per_token = ideal_seconds_per_token
        self.tokens, self.seconds = [], []  # of this process' steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, bar, step: int, metrics: Metrics, tokens: int, began: float) -> float:
        """Waits for the metrics of a step, checks and logs them; returns the time."""
        values = {name: float(value) for name, value in metrics._asdict().items()}
        now = time.perf_counter()
        seconds = now - began
        mfu = self._ideal_seconds_per_token * tokens / seconds
        line = {"step": step, **values, "tokens": tokens, "seconds": seconds, "mfu": mfu}
        self._file.write(json.dumps(line) + "\n")
        if not math.isfinite(values["loss"]):
            rows = self._batches.rows(step).tolist()
            raise FloatingPointError(
                f"the loss of step {step} is {values['loss']} on examples {rows}; the last "
                "checkpoint is intact: lower optimizer.learning_rate or look at these examples"
            )
        bar.update()
        bar.set_postfix(
            loss=f"{values['loss']:.3f}",
            nll=f"{values['nll_per_title']:.2f}",
            tokens_s=f"{tokens / seconds:.0f}",
            mfu=f"{mfu:.2f}",
        )
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        return now

    def summary(self) -> str:
        """Medians of this process' steps: most of them compile nothing."""
        seconds, tokens = np.array(self.seconds), np.array(self.tokens)
        speed = float(np.median(tokens / seconds))
        return (
            f"{np.median(seconds):.2f} s a step, {speed:.0f} tokens/s, "
            f"MFU {self._ideal_seconds_per_token * speed:.2f}"
        )


def read_log(path: Path) -> list[dict]:
    """The lines of a training log; none if it does not exist; a half-written end is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
