"""Files are replaced whole or not at all; fingerprints depend on values, not on their order."""

import os
import platform
import subprocess

import numpy as np
import pytest

from tca4rec_jax import fileio
from tca4rec_jax.fileio import atomic_path, file_sha256, fingerprint, write_npz, write_text


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
    host = platform.node()
    left = tmp_path / f".data.{host}.{dead.pid}.0a1b2c3d.partial"
    live = tmp_path / f".data.{host}.{os.getpid()}.0a1b2c3d.partial"
    elsewhere = tmp_path / f".data.not-{host}.{dead.pid}.0a1b2c3d.partial"
    for folder in (left, live, elsewhere):
        _write_folder(folder / "inside")
    fileio._remove_abandoned.cache_clear()
    write_text(tmp_path / "a.txt", "text")
    assert not left.exists()
    assert live.exists()
    assert elsewhere.exists()


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
