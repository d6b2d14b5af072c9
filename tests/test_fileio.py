"""Files are replaced whole or not at all; fingerprints depend on values, not on their order."""

import errno
import os
import subprocess

import numpy as np
import pytest

from tca4rec_jax import fileio
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import (
    atomic_path,
    check_room,
    file_sha256,
    fingerprint,
    read_json,
    read_json_lines,
    read_npz,
    write_npz,
    write_text,
)


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_after_an_error_the_old_file_stands(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half way"):
        _write_half(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_an_empty_folder_and_nothing_else(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    _write_folder(path)
    with pytest.raises(OSError, match="not empty"):
        _write_folder(path)
    assert [file.name for file in path.iterdir()] == ["one"]
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "data"
    monkeypatch.setattr(fileio, "sync", lambda path: synced.append((path, path.exists())))
    _write_folder(path)
    names = [path.name.rpartition(".")[2] for path, _ in synced]
    assert names == ["partial", "one", tmp_path.name]  # the folder, its file; then around it
    assert all(existed for _, existed in synced)


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    host, namespace = fileio.process_space()
    gone = [f"{host}.{namespace}.{dead.pid}"]
    stay = [
        f"{host}.{namespace}.{os.getpid()}",
        f"not-{host}.{namespace}.{dead.pid}",
        f"{host}.1{namespace}.{dead.pid}",  # of a container, where that number may be alive
        f"{host}.{dead.pid}",
    ]
    for process in gone + stay:
        _write_folder(tmp_path / f".data.{process}.0a1b2c3d.partial" / "inside")
    fileio._remove_abandoned.cache_clear()
    write_text(tmp_path / "a.txt", "text")
    left = {path.name for path in tmp_path.iterdir()} - {"a.txt"}
    assert left == {f".data.{process}.0a1b2c3d.partial" for process in stay}


def test_scratch_says_who_writes_it(tmp_path):
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("text")
    host, namespace = fileio.process_space()
    assert temporary.name.startswith(f".a.txt.{host}.{namespace}.{os.getpid()}.")


def _write_folder(path):
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "one").write_text("one")


def _write_half(path):
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")


def test_fingerprints(tmp_path):
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    write_text(tmp_path / "a", "abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")


def test_arrays_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "arrays.npz"
    arrays = {"a": np.arange(3, dtype=np.int32), "b": np.array("text")}
    write_npz(path, **arrays)
    with np.load(path, allow_pickle=False) as saved:
        assert set(saved) == {"a", "b"}
        for name, values in arrays.items():
            np.testing.assert_array_equal(saved[name], values)
            assert saved[name].dtype == values.dtype
    assert [file.name for file in path.parent.iterdir()] == ["arrays.npz"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("9 of 10 written")):
        path = tmp_path / "a.npz"
        with pytest.raises(OSError, match=r"No space|9 of 10") as raised, atomic_path(path):
            raise error
        assert raised.value.filename == str(tmp_path / "a.npz")
    check_room(tmp_path / "new", 10, "files")
    with pytest.raises(UserError, match=r"new has room for .*, files take 1000000000\.00 GB"):
        check_room(tmp_path / "new", 10**18, "files")


def test_damaged_arrays_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match=r"a\.npz: no such file"):
        read_npz(path, remedy="")
    write_npz(path, a=np.arange(1000))
    content = path.read_bytes()
    for cut in (0, 100, len(content) - 30):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"a\.npz: not a readable \.npz file .*; make it anew"):
            read_npz(path, remedy="make it anew")
    np.savez(path, a=np.array([{}]))
    with pytest.raises(UserError, match=r"a\.npz: not a readable .*allow_pickle"):
        read_npz(path, remedy="")
    path.write_bytes(content)
    np.testing.assert_array_equal(read_npz(path, remedy="")["a"], np.arange(1000))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_damaged_json_is_an_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json: (not a readable JSON|expected an object)"):
        read_json(path)


@pytest.mark.parametrize("end", [b'{"a": ', b"3", b"[1]", b"\0\xff\xfe"])
def test_a_damaged_end_of_json_lines_is_left_out(tmp_path, end):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + end + b"\n")
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}]
