"""The log of a training run: one JSON line per step and validation, the progress, the speed."""

import json
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.fileio import read_json_lines, sync, write_text
from tca4rec_jax.terminal import Progress
from tca4rec_jax.trackers import Trackers
from tca4rec_jax.training.state import Metrics
from tca4rec_jax.training.validation import SECTION, validations_of

_SHOWN_STEPS = 20  # whose mean loss and speed are shown


class TrainingLog:
    """Appends one JSON line per step, from step `start` on; later ones that are there are dropped.

    A validation after n steps has a line of its own, with the step n. `validations` are those of
    earlier processes and of this one, {step: {metric: value}}.

    In a job of several processes only the first one writes; all of them have the same values.
    `name` is that of the progress that is shown. `ideal_seconds_per_token` is a token's useful
    FLOPs at the devices' peak, for the MFU. What is in the lines goes to `trackers`, too, which
    were opened for `start`.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: int,
        total_steps: int,
        ideal_seconds_per_token: float,
        name: str,
        trackers: Trackers | None = None,
    ):
        self._path, self._file, self._trackers = path, None, trackers or Trackers()
        lines = read_json_lines(path)
        kept = [line for line in lines if line["step"] < start + ("loss" not in line)]
        self._loss_of_step = {line["step"]: line["loss"] for line in kept if "loss" in line}
        self.validations = validations_of(kept)
        if is_main_process():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", buffering=1)
        self._progress = Progress(name, total_steps, "steps", start)
        self._ideal_seconds_per_token = ideal_seconds_per_token
        self._sizes: list[tuple[int, float]] = []  # tokens and seconds of each step
        self._losses = deque(list(self._loss_of_step.values())[-_SHOWN_STEPS:], _SHOWN_STEPS)
        self._validated: tuple[str, ...] = ()  # what is shown of the last one
        for line in kept:
            # Its validation: TensorBoard forgets what is not before start.
            if line["step"] == start:
                self._track(line)
        self._began = time.perf_counter()

    def __enter__(self):
        self._progress.__enter__()
        return self

    def __exit__(self, *error):
        self._progress.__exit__(*error)
        if self._file:
            self._file.close()

    def write(self, step: int, metrics: Metrics, tokens: int) -> Metrics:
        """Waits for the metrics of a step and logs them; returns them as floats.

        Raises OSError naming the log if it cannot be written (a full disk).
        """
        metrics = jax.tree.map(float, metrics)
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        mfu = self._ideal_seconds_per_token * tokens / seconds
        logged = {name: value for name, value in metrics._asdict().items() if value is not None}
        self._append({"step": step, **logged, "tokens": tokens, "seconds": seconds, "mfu": mfu})
        self._loss_of_step[step] = metrics.loss
        self._losses.append(metrics.loss)
        self._sizes.append((tokens, seconds))
        speed = np.median([of / took for of, took in self._sizes[-_SHOWN_STEPS:]])
        said = f"loss {np.mean(self._losses):.3f}", *self._validated, f"{speed:,.0f} tokens/s"
        self._progress.advance(1, *said)
        return metrics

    def write_validation(self, step: int, found: Mapping[str, float], shown: str) -> None:
        """Logs what a validation after `step` steps has found; it is on the disk on return.

        The progress shows the metric `shown` from now on. Raises OSError as `write`.
        """
        seconds, self._began = time.perf_counter() - self._began, time.perf_counter()
        values = {f"{SECTION}/{name}": value for name, value in found.items()}
        self._append({"step": step, **values, f"{SECTION}/seconds": seconds})
        if self._file:
            sync(self._path)
        self.validations[step] = {**found, "seconds": seconds}
        self._validated = (f"{shown} {found[shown]:.4f}",)

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:  # a failed write does not say of what
            message = f"{error.strerror}; make room and start again, the checkpoints are kept"
            raise OSError(error.errno, message, str(self._path)) from error
        self._track(line)

    def _track(self, line: Mapping[str, Any]) -> None:
        values = dict(line)
        self._trackers.scalars(values.pop("step"), values)

    def mean_loss(self, step: int, every: int) -> float:
        """The mean of the finite losses of the steps that a checkpoint after `step` steps ends.

        They begin at the last multiple of `every`, whether the run was interrupted since or not;
        infinite if a loss is not in the log.
        """
        steps = range((step - 1) // every * every, step)
        losses = np.array([self._loss_of_step.get(one, np.inf) for one in steps])
        finite = losses[~np.isnan(losses)]
        return float(np.mean(finite)) if finite.size else float("inf")

    def summary(self) -> str:
        """The median speed of this process' steps (most compile nothing); '' without steps."""
        if not self._sizes:
            return ""
        tokens, seconds = np.array(self._sizes).T
        speed = float(np.median(tokens / seconds))
        mfu = self._ideal_seconds_per_token * speed
        return f"{np.median(seconds):.2f} s a step, {speed:.0f} tokens/s, MFU {mfu:.2f}"
