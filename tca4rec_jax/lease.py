"""One writer: what a process writes, no other process writes at the same time.

The lease of a file or folder is a small file beside it, which says who holds it: host, process,
when that began. The holder touches it every few seconds. What a dead process has left is taken
over: on the same host one that no longer runs, of another host one that nobody touches.
"""

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from absl import logging

from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import process_space

_TOUCHED_EVERY = 10.0  # seconds
_SILENT = 90.0  # seconds without a touch after which a process of another host counts as dead
_LOST = 1  # the exit status of a process whose lease was taken over


class LeaseError(UserError):
    """Another process writes there; says which."""


class Holder(NamedTuple):
    """A process that writes.

    Attributes:
      host: its name, and the namespace of its process numbers (a container has its own).
      process: its number there.
      started: when it began, in the kernel's ticks; '' where the system does not say.
      since: when it took the lease, for people.
    """

    host: str
    process: int
    started: str
    since: str

    @classmethod
    def this(cls) -> "Holder":
        """This process."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(" ".join(process_space()), os.getpid(), _started(os.getpid()) or "", now)

    @property
    def runs(self) -> bool | None:
        """Whether it runs; None if it is of another host."""
        here = self.host == " ".join(process_space())
        return _started(self.process) == self.started if here else None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host.partition(' ')[0]}, since {self.since}"


def holder_of(path: Path) -> Holder | None:
    """Who holds the lease of a file or folder, as far as is known; None if nobody does."""
    try:
        holder = _read(_lease(path).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return None if holder is None or holder.runs is False else holder


@contextlib.contextmanager
def only_writer(path: Path | str) -> Iterator[None]:
    """Nobody else is in such a block for the same file or folder, which need not exist yet.

    A URL has no lease. A process of another host that seems dead is watched for a minute and a
    half. Raises LeaseError at once, naming the holder, if there is one.
    """
    if "://" in str(path):
        yield
        return
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lease, this = _lease(path), Holder.this()
    _take(path, lease, this)
    over = threading.Event()
    threading.Thread(target=_keep, args=(lease, this, over), name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with _locked(lease) as file:
            if _read(file.read()) == this:
                lease.unlink()


def _take(path: Path, lease: Path, this: Holder) -> None:
    deadline, touched = 0.0, 0
    while True:
        with _locked(lease) as file:
            holder = _read(file.read())
            runs = holder is not None and holder.runs
            if runs is None:  # of another host: dead if nobody touches it while we look
                now, last = time.monotonic(), os.fstat(file.fileno()).st_mtime_ns
                if not deadline:
                    deadline, touched = now + _SILENT, last
                    logging.info("%s: is %s alive? Waiting for a sign of it", path, holder)
                runs = None if now < deadline and last == touched else last != touched
            if runs:
                raise LeaseError(f"{path} is being written by {holder}: wait, or end that one")
            if runs is False:
                file.seek(0)
                file.truncate()
                file.write(json.dumps(this._asdict()))
                return
        time.sleep(_TOUCHED_EVERY / 10)


def _keep(lease: Path, this: Holder, over: threading.Event) -> None:
    """Touches the lease until it is over; ends the process if another one has taken it."""
    while not over.wait(_TOUCHED_EVERY):
        with contextlib.suppress(OSError), _locked(lease) as file:
            holder = _read(file.read())
            if holder == this:
                os.utime(lease)
            elif not over.is_set():
                print(f"{lease}: taken over by {holder}", file=sys.__stderr__, flush=True)
                os._exit(_LOST)


@contextlib.contextmanager
def _locked(lease: Path) -> Iterator[TextIO]:
    """The lease's file, made if it is missing, which no other process reads or writes meanwhile."""
    while True:
        with open(lease, "a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, lease):  # its holder has ended and removed it
                continue
            file.seek(0)
            yield file
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lease(path: Path) -> Path:
    return path.with_name(f".{path.name}.lease")


def _read(text: str) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (TypeError, ValueError):  # new, or cut short by a crash
        return None


def _started(process: int) -> str | None:
    """When a process of this host began; '' if the system does not say, None if it has ended."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        return None if state in "ZX" else fields[18]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
