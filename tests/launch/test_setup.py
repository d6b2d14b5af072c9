"""launch/setup.sh on small locks of its own: what it makes, reuses, mends, refuses; no network."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "launch" / "setup.sh"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder, name, version="1"):
    """A wheel of one module; the line of a lock for it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"--no-index\n--find-links={folder}\n{name}=={version} --hash=sha256:{digest}\n"


def setup(checkout, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_EXTRA"}
    return subprocess.run(
        ["bash", "launch/setup.sh"], cwd=checkout, env=environment | variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def done(checkout, **variables):
    """What a setup that goes well prints."""
    found = setup(checkout, **variables)
    assert found.returncode == 0, found.stderr
    return found.stdout


def refused(checkout, **variables):
    """The one line of a setup that does not go on."""
    found = setup(checkout, **variables)
    assert found.returncode == 1
    (line,) = found.stderr.strip().splitlines()
    return line


def has(checkout, module):
    found = subprocess.run(
        [checkout / ".venv/bin/python", "-c", f"import {module}"], capture_output=True
    )
    return found.returncode == 0


def script(path, text):
    """An executable in the place of another."""
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkout whose .venv has just been made."""
    folder = tmp_path_factory.mktemp("setup")
    checkout = folder / "checkout"
    locks = checkout / "launch" / "locks"
    locks.mkdir(parents=True)
    shutil.copy(SETUP, checkout / "launch")
    for name in ("run", "test", "tpu"):
        (locks / f"{name}.txt").write_text(wheel(folder, f"needed_to_{name}"))
    assert "installing launch/locks/run.txt" in done(checkout, PYTHON=sys.executable)
    return checkout


@pytest.fixture
def checkout(made, tmp_path):
    """A copy of it, with a file that is lost when .venv is made anew."""
    copy = Path(shutil.copytree(made, tmp_path / "copy", symlinks=True))
    (copy / ".venv" / "mine.txt").write_text("kept")
    done(copy)
    return copy


def kept(checkout):
    return (checkout / ".venv" / "mine.txt").exists()


def test_it_holds_the_locked_releases_and_the_package(made):
    assert has(made, "needed_to_run")
    assert not has(made, "needed_to_test")
    (made / "tca4rec_jax.py").touch()
    assert has(made, "tca4rec_jax")


def test_nothing_is_done_when_nothing_has_changed(checkout):
    script(checkout / ".venv/bin/pip", "exit 1")
    assert done(checkout) == ""
    assert done(checkout, PYTHON=sys.executable) == ""
    assert kept(checkout)


def test_further_locks_are_added_and_stay(checkout):
    assert "launch/locks/test.txt" in done(checkout, setup_also="test")
    assert has(checkout, "needed_to_test")
    assert done(checkout) == done(checkout, setup_also="test") == ""
    assert kept(checkout)


def test_a_changed_lock_is_installed_and_a_wrong_hash_is_not(checkout):
    lock = checkout / "launch/locks/run.txt"
    good = wheel(checkout.parent, "needed_to_run", "2")
    lock.write_text(good.replace("sha256:", "sha256:" + "0" * 8)[:-9] + "\n")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in setup(checkout).stderr
    lock.write_text(good)
    assert "installing" in done(checkout)
    assert has(checkout, "needed_to_run")
    assert kept(checkout)  # pip checks before it installs


def test_an_interrupted_installation_begins_anew(checkout):
    (checkout / "launch/locks/run.txt").write_text(wheel(checkout.parent, "needed_to_run", "3"))
    python = checkout / ".venv/bin/python"
    kill = f'case "$*" in *install*) kill -9 $PPID;; esac\nexec {python.resolve()} "$@"'
    real = os.readlink(python)
    script(python, kill)
    assert setup(checkout).returncode == -9
    python.unlink()
    python.symlink_to(real)
    assert "anew: its installation was interrupted" in done(checkout)
    assert has(checkout, "needed_to_run")
    assert not kept(checkout)


def test_without_pip_it_is_mended(checkout):
    shutil.rmtree(checkout / ".venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True)
    (checkout / ".venv" / "mine.txt").touch()
    assert "installing" in done(checkout)
    assert has(checkout, "needed_to_run")
    assert kept(checkout)


def test_a_python_that_cannot_start_is_replaced(checkout):
    python = checkout / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    assert "anew: its Python does not start" in done(checkout, PYTHON=sys.executable)
    assert has(checkout, "needed_to_run")


def test_another_python_is_taken_when_it_is_asked_for(checkout):
    python = checkout / ".venv/bin/python"
    script(python, "echo 3.14" if VERSION != "3.14" else "echo 3.13")
    assert "anew: it is of Python 3.1" in done(checkout, PYTHON=sys.executable)
    assert has(checkout, "needed_to_run")


def test_what_was_not_made_here_is_never_removed(checkout):
    (checkout / ".venv/made_by_setup").unlink()
    script(checkout / ".venv/bin/python", "exit 1")
    assert "move it out of the way" in refused(checkout, PYTHON=sys.executable)
    assert kept(checkout)


def test_an_unsupported_python_is_refused(checkout, tmp_path):
    script(tmp_path / "python3.10", 'test "$1" = --version && echo Python 3.10.1 || exit 1')
    line = refused(checkout, PYTHON=str(tmp_path / "python3.10"))
    assert "python3.10 is Python 3.10.1, but CPython 3.11 to 3.14 is needed; set PYTHON" in line
    assert kept(checkout)


def test_an_accelerator_is_kept_until_another_is_asked_for(checkout):
    assert "launch/locks/tpu.txt" in done(checkout, JAX_EXTRA="tpu")
    assert done(checkout) == ""
    assert kept(checkout)
    assert has(checkout, "needed_to_tpu")
    assert "anew: it is for tpu" in done(checkout, JAX_EXTRA="")
    assert not has(checkout, "needed_to_tpu")
    assert "JAX_EXTRA is rocm: expected tpu" in refused(checkout, JAX_EXTRA="rocm")


def test_a_checkout_that_has_moved_imports_itself(checkout):
    (checkout / "tca4rec_jax.py").touch()
    moved = checkout.rename(checkout.with_name("moved"))
    assert done(moved) == ""
    assert has(moved, "tca4rec_jax")
