"""Fault tolerance of a training run: stop signals, a watchdog, checks of the work directory."""

import contextlib
import faulthandler
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from tca4rec_jax.distributed.multihost import is_multiprocess
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import check_room

# Exit statuses of a run that was asked to stop (as a shell reports SIGTERM), and of a hung run.
STOPPED, HUNG = 128 + signal.SIGTERM, 75


class Stopped(Exception):
    """The run was asked to stop and has saved its state; says where."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read; says which, why and what to do."""


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Notices SIGTERM, which Slurm, Kubernetes and preempted machines send before SIGKILL.

    The block gets a function to ask once a step, of training or of a validation: whether to stop
    now. A single process handles the signal itself. In a job of several, all of which ask equally
    often, JAX tells every process that one was signalled, and all of them stop at a question that
    they agree on.
    """
    if is_multiprocess():
        questions = itertools.count()
        yield lambda: multihost_utils.reached_preemption_sync_point(next(questions))
        return
    received = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)


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
                message = (
                    f"{self._name}: step {self._step} was not done after {self._seconds:g} s "
                    "(training.watchdog_seconds): the stacks of all threads are above; start "
                    "again, it goes on from the last checkpoint"
                )
                print(message, file=sys.__stderr__, flush=True)
                os._exit(HUNG)


def check_folder(folder: Path, num_bytes: int, what: str = "") -> None:
    """Makes a folder. Raises UserError if `what`, of so many bytes, can't be written to it.

    Nor is one good that can't rename a folder with its contents, as flat buckets can't (gcsfuse):
    checkpoints and stores are written beside and renamed into place.
    """
    probe = folder / f".probe_{jax.process_index()}"
    moved = probe.with_name(f"{probe.name}_renamed")
    try:
        for left in (probe, moved):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        (probe / "inside").mkdir(parents=True)
        (probe / "inside" / "file").write_bytes(b"\0" * 4096)
        probe.rename(moved)
        shutil.rmtree(moved)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to, or folders in it not be renamed ({error.strerror}): "
            "give another --workdir"
        ) from error
    check_room(folder, num_bytes, what)
