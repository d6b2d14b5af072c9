"""Fault tolerance of a training run: stop signals, a watchdog, checks of the work directory."""

import faulthandler
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from tca4rec_jax.distributed.multihost import is_multiprocess
from tca4rec_jax.errors import UserError

# Exit statuses of a run that was asked to stop (as a shell reports SIGTERM), and of a hung run.
STOPPED, HUNG = 128 + signal.SIGTERM, 75


class Stopped(Exception):
    """The run was asked to stop and has saved its state; says where."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read; says which, why and what to do."""


class StopSignal:
    """Notices SIGTERM, which Slurm, Kubernetes and preempted machines send before SIGKILL.

    A single process handles the signal itself. In a job of several, JAX tells every process that
    one was signalled, and all of them stop at a step that they agree on.
    """

    def __init__(self):
        self._received = False
        self._several = is_multiprocess()

    def __enter__(self):
        if not self._several:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if not self._several:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_):
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to stop now, with `step` steps done; ask once per step."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received


class Watchdog:
    """Ends the process if for `seconds` it hears of no progress; 0 never does.

    A hung collective can't be interrupted by an exception. The stacks of all threads are printed
    with the step, and the exit status is HUNG: started again, the run goes on from its last
    checkpoint.
    """

    def __init__(self, seconds: float, name: str, step: int):
        self._seconds, self._name = seconds, name
        self._over = threading.Event()
        self.progress(step)

    def __enter__(self):
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()

    def progress(self, step: int) -> None:
        """Tells the watchdog that work on `step` begins now."""
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 5.0)):
            if time.monotonic() - self._since > self._seconds:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                print(
                    f"{self._name}: step {self._step} was not done after {self._seconds:g} s "
                    "(training.watchdog_seconds): the stacks of all threads are above; start "
                    "again, it goes on from the last checkpoint",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(HUNG)


def check_folder(folder: Path, num_bytes: int) -> None:
    """Makes sure that files of so many bytes can be written to a folder, which is created.

    Raises:
      UserError: it can't be created or written to, or lacks the room.
    """
    probe = folder / f".probe_{jax.process_index()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}): give another --workdir"
        ) from error
    if free < num_bytes:
        raise UserError(
            f"{folder} has room for {free / 1e9:.2f} GB, a checkpoint takes {num_bytes / 1e9:.2f} "
            "GB: make room, or give another --workdir"
        )
