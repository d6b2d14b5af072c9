"""The log of a training run: one JSON line per step, the progress bar, and how fast it went."""

import json
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.fileio import read_json_lines, write_text
from tca4rec_jax.training.state import Metrics


class TrainingLog:
    """Appends one JSON line per step, from step `start` on; later ones that are there are dropped.

    In a job of several processes only the first one writes and shows the bar, called `name`; all of
    them have the same values. `ideal_seconds_per_token` is a token's useful FLOPs at the devices'
    peak, for the MFU.
    """

    def __init__(
        self, path: Path, *, start: int, total_steps: int, ideal_seconds_per_token: float, name: str
    ):
        self._path, self._file = path, None
        kept = [line for line in read_json_lines(path) if line["step"] < start]
        self._loss_of_step = {line["step"]: line["loss"] for line in kept}
        if is_main_process():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", buffering=1)
        disable = None if is_main_process() else True
        self._bar = tqdm(total=total_steps, initial=start, desc=name, unit="step", disable=disable)
        self._ideal_seconds_per_token = ideal_seconds_per_token
        self._sizes: list[tuple[int, float]] = []  # tokens and seconds of each step
        self._began = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
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
        line = {"step": step, **logged, "tokens": tokens, "seconds": seconds, "mfu": mfu}
        if self._file:
            try:
                self._file.write(json.dumps(line) + "\n")
            except OSError as error:  # a failed write does not say of what
                message = f"{error.strerror}; make room and start again, the checkpoints are kept"
                raise OSError(error.errno, message, str(self._path)) from error
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss={metrics.loss:.3f}, nll={metrics.nll_per_title:.2f}, "
            f"tokens_s={tokens / seconds:.0f}, mfu={mfu:.2f}"
        )
        self._loss_of_step[step] = metrics.loss
        self._sizes.append((tokens, seconds))
        return metrics

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
