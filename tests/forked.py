"""Processes forked from a server that has imported what they import.

Each is a process of its own, as from a shell, but starts in a fraction of a second.
"""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from tca4rec_jax.data.downloads import default_cache_dir

_MOST_BYTES = 500 << 20
_PRELOAD = [  # not what defines flags, as some scripts define others of these names
    "tca4rec_jax.compile_ahead.programs",
    "tca4rec_jax.cf.pipeline",
    "tca4rec_jax.decoding.recommend_file",
    "tca4rec_jax.evaluation.evaluate",
    "tca4rec_jax.experiments.work",
]


def keep_programs(first: bool = False) -> None:
    """What XLA compiles is found by the next run of the tests: a third of their time.

    The first process of a run throws all of it away once it is more than half a gigabyte.
    """
    folder = default_cache_dir() / "compiled_tests"
    kept = folder.iterdir() if first and folder.is_dir() else ()
    if sum(file.stat().st_size for file in kept) > _MOST_BYTES:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def start(function: Callable, *args) -> multiprocessing.Process:
    """A process that runs a function of a module; no backend of JAX has started in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=function, args=args)
    process.start()
    return process


class Script:
    """A launch script in a process; what it prints goes to a file each for stdout and stderr."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], devices: int = 0):
        """command: script, arguments; devices: of the process on CPU, 0: one for every core."""
        self._command, self._folder = command, tempfile.TemporaryDirectory()
        self._process = start(run, command, environment, devices, self._folder.name)
        self.pid = self._process.pid

    def wait(self, seconds: float = 300) -> int:
        """Its exit status; subprocess.TimeoutExpired after so long, and it is killed."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._command, seconds)
        return self._process.exitcode

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.exitcode is not None

    def printed(self, name: str) -> str:
        """What it has written to 'stdout' or 'stderr' so far."""
        return Path(self._folder.name, name).read_text()

    def completed(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """What subprocess.run would return."""
        return subprocess.CompletedProcess(
            self._command, self.wait(seconds), self.printed("stdout"), self.printed("stderr")
        )


def run(command: Sequence[str], environment: dict[str, str], devices: int, folder: str) -> None:
    for name in ("stdout", "stderr"):
        file = open(Path(folder, name), "w", buffering=1)  # noqa: SIM115 - the process' own
        os.dup2(file.fileno(), getattr(sys, f"__{name}__").fileno())
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    os.environ.update(environment)
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
