"""Files that are there whole or not at all, and the fingerprint of what something was made from."""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends without an error.

    The block writes a file or makes a folder there. After an error nothing is left of it, and what
    stood at `path` stands as before. The folder around `path` is made if it is missing. A folder at
    `path` is replaced: the caller knows that it may be. Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            path.rename(old := temporary.with_suffix(".old"))
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes an uncompressed .npz file atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a JSON-lines file; none if it is missing; a half-written end is left out."""
    lines: list[dict] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, whatever the order of its keys; tuples count as lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
