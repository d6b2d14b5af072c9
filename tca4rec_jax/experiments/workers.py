"""Processes that work on one grid side by side, one for each accelerator."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tca4rec_jax.reporting import show


def run_workers(command: Sequence[str], devices: Sequence[str], workdir: Path) -> int:
    """Runs a command once for each GPU number, which alone it sees; returns the worst exit status.

    What a worker prints goes to WORKDIR/worker_<device>.log. A stop signal is sent on to all, which
    then end as they do alone.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        workers = []
        for device in devices:
            path = workdir / f"worker_{device}.log"
            log = stack.enter_context(path.open("a"))
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
            workers.append(
                subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=log, stderr=log
                )
            )
            show(f"GPU {device}: process {workers[-1].pid}, {path}")
        with _passing_on(signal.SIGTERM, workers):
            return max(abs(worker.wait()) for worker in workers)


@contextlib.contextmanager
def _passing_on(number: signal.Signals, workers: Sequence[subprocess.Popen]) -> Iterator[None]:
    def stop(*_) -> None:
        for worker in workers:
            worker.send_signal(number)

    previous = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, previous)
