"""Launch scripts in processes forked from a server that has imported what they import.

Each is a process of its own, as from a shell, but starts in a fraction of a second.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOAD = [
    "forked",
    "tca4rec_jax.cf.run",
    "tca4rec_jax.decoding.recommend_file",
    "tca4rec_jax.evaluation.evaluate",
    "tca4rec_jax.launching",
]


class Script:
    """`command` (script, arguments) in a process; what it prints goes to files."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)  # a server that runs already keeps its own
        # Python 3.11.7 and others forget to tell the server sys.path, and then it imports nothing.
        here = str(Path(__file__).parent)
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        if here not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join([here, *paths])
        self._command, self._folder = command, tempfile.TemporaryDirectory()
        self._process = context.Process(target=_run, args=(command, environment, self._folder.name))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds: float = 300) -> int:
        """Its exit status; subprocess.TimeoutExpired after so long, and it is killed."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._command, seconds)
        return self._process.exitcode

    def completed(self) -> subprocess.CompletedProcess:
        """What subprocess.run would return."""
        status = self.wait()
        printed = [Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self._command, status, *printed)


def _run(command: list[str], environment: dict[str, str], folder: str) -> None:
    for name in ("stdout", "stderr"):
        file = open(Path(folder, name), "w", buffering=1)  # noqa: SIM115 - the process' own
        os.dup2(file.fileno(), getattr(sys, f"__{name}__").fileno())
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
