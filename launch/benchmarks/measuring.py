"""What the benchmarks share: cases in processes of their own, memory, and a loop in PyTorch."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tca4rec_jax.data.ragged import Ragged

# glibc keeps the pages of freed arrays; by default each large one is mapped and faulted in again.
PAGES_REUSED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "30000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
# As launch/quickstart.sh has it.
QUICKSTART_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}


def run_alone(script: str, case: dict, label: str, *, pages_reused: bool) -> dict | None:
    """Runs `script --case=<JSON>` in a process of its own; what its last line prints, as JSON.

    None where it cannot run; the reason is printed.
    """
    environment = os.environ | (PAGES_REUSED if pages_reused else {})
    command = [sys.executable, script, f"--case={json.dumps(case)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"{label} is left out: {last}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


class Contestant:
    """`script --case=<JSON>` in a process of its own, which takes a step whenever it is told to.

    It prints a line when it is ready and a line of JSON for every number that it reads. With
    wait=False its start returns at once, and `wait` has to be called before the first step; several
    contestants asked with `ask` before the first is `answered` take a step at the same time.

    Attributes:
      steps: what it has said of each step.
      failure: the last line of its errors if it has ended early, else None.
    """

    def __init__(
        self,
        script: str,
        case: dict,
        flags: Sequence[str] = (),
        *,
        environment: dict[str, str],
        wait: bool = True,
    ):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until `end`
        self._process = subprocess.Popen(
            [sys.executable, script, f"--case={json.dumps(case)}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # JAX's errors then end with what went wrong.
            env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | environment,
        )
        self.failure: str | None = None
        self.steps: list[dict] = []
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it is ready, or has failed."""
        self._answer()

    def step(self, number: int) -> bool:
        """Whether it was taken."""
        self.ask(number)
        return self.answered()

    def ask(self, number: int) -> None:
        """For a step, without waiting for it."""
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            print(number, file=self._process.stdin, flush=True)

    def answered(self) -> bool:
        """Whether the step that was asked for was taken."""
        if answer := self._answer():
            self.steps.append(json.loads(answer))
        return bool(answer)

    def _answer(self) -> str:
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["killed"]
            self.failure = lines[-1]
            print(*lines[-30:], sep="\n", file=sys.stderr)
        return answer

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


def memory_mb(field: str) -> float:
    """A size from /proc/self/status: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


def peak_memory_mb() -> float:
    """The most that this process has held: of the GPU it computes on, else of the host."""
    torch = sys.modules.get("torch")
    if torch is not None:
        on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    else:
        import jax

        on_gpu = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return memory_mb("VmHWM") if on_gpu is None else on_gpu / 1e6


def share_the_gpu() -> None:
    """JAX takes what it needs of a GPU, here and in processes started from here, not most of it.

    Before any use of a device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytorch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def restart_peak() -> None:
    """VmHWM starts anew from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def prefixes(titles: Ragged, targets) -> dict:
    """{prefix of a target's title: (items below it, their next tokens)}: a dictionary trie."""
    found = {}
    for item in targets:
        title = titles[item].tolist()
        found |= {tuple(title[:t]): ([], []) for t in range(len(title))}
    for item in range(len(titles)):
        title = tuple(titles[item].tolist())
        for t in range(len(title)):
            if title[:t] not in found:
                break
            items, following = found[title[:t]]
            items.append(item)
            following.append(title[t])
    return found


def cf_distributions_loop(below: dict, titles: list, starts: list, cf_BxI, beta: float, like_BxSxV):
    """p_cf by a loop over rows and positions, as most people would write it in PyTorch.

    Args:
      below: from `prefixes`, as tensors; titles, starts: of each row its target's tokens and the
        position whose logits predict the first of them.
      like_BxSxV: zeros of its shape and dtype hold the result.
    """
    import torch

    cf_BxSxV = torch.zeros_like(like_BxSxV)
    for b, (title, start) in enumerate(zip(titles, starts, strict=True)):
        for t in range(len(title)):
            items, following = below[tuple(title[:t])]
            q = torch.softmax(cf_BxI[b, items] / beta, dim=0).to(cf_BxSxV.dtype)
            cf_V = torch.zeros(like_BxSxV.shape[2], dtype=cf_BxSxV.dtype)
            cf_BxSxV[b, start + t] = cf_V.scatter_add(0, following, q)
    return cf_BxSxV
