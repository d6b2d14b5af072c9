"""Files are replaced whole or not at all; fingerprints depend on values, not on their order."""

import numpy as np
import pytest

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


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "store"
    for name in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


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
