"""Files that are there whole or not at all, that may be damaged when read, and fingerprints."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tca4rec_jax.errors import UserError, reading


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends without an error.

    The block writes a file, which replaces one, or makes a folder, which replaces nothing but an
    empty folder. It is on the disk before it is renamed, so that a crash leaves the old or the new.
    After an error nothing is left of it. The folder around `path` is made if it is missing. Raises
    OSError, with the path (a full disk does not say of what), if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    unique = ".".join([*process_space(), str(os.getpid()), uuid.uuid4().hex[:8]])
    temporary = path.with_name(f".{path.name}.{unique}.partial")
    try:
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            sync(written)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        remove(temporary)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_space() -> tuple[str, str]:
    """The host's name, and the number of the namespace that numbers its processes.

    A container has a namespace of its own; '0' where the system does not say.
    """
    namespace = 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return socket.gethostname(), str(namespace)


@cache
def _remove_abandoned(folder: Path) -> None:
    """Removes, once in a process, what killed processes of this host left in a folder.

    Those of another space of process numbers may be alive.
    """
    for scratch in folder.glob(f".*.{glob.escape('.'.join(process_space()))}.*.partial"):
        if not _is_alive(scratch.suffixes[-3].removeprefix(".")):
            remove(scratch)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):  # another user's; not a name of ours
        pass
    return True


def remove(path: Path) -> None:
    """Deletes a file or a folder with all that is in it, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes an uncompressed .npz file atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def check_room(folder: Path, num_bytes: int, what: str, otherwise: str = "write elsewhere") -> None:
    """Raises UserError if the disk of a folder, made if it is missing, lacks room for so much."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{folder} has room for {free / 1e9:.2f} GB, {what} take {num_bytes / 1e9:.2f} GB: "
            f"make room, or {otherwise}"
        )


def read_npz(path: Path, *, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises UserError naming it if it is missing or damaged."""
    with reading(path, ".npz file", remedy=remedy), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds something that is no array")
        return arrays


def read_json(
    path: Path,
    *,
    remedy: str = "fetch it again",
    of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming it if it is missing or is no object.

    `of_pairs` makes an object of its names and values, and may raise ValueError; by default the
    last value of a name counts.
    """
    with reading(path, "JSON file", remedy=remedy):
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=of_pairs)
        if not isinstance(content, dict):
            raise UserError(f"expected an object in braces, got {type(content).__name__}")
        return content


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a JSON-lines file; none if it is missing; a half-written end is left out."""
    lines: list[dict] = []
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            lines.append({**json.loads(line)})
        except (TypeError, ValueError):
            break
    return lines


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, whatever the order of its keys; tuples count as lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
