"""Which checkpoints are kept and read, and folders that can't hold any."""

import errno
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import logging

from tca4rec_jax.distributed.sharding import make_mesh, put, replicated
from tca4rec_jax.errors import UserError
from tca4rec_jax.sections import TrainingFields
from tca4rec_jax.training.checkpoint import Checkpoints, checkpoints_to_fit
from tca4rec_jax.training.fault_tolerance import CheckpointError, check_folder
from tca4rec_jax.training.state import TrainState


def state(step, rows=5):
    params = {"a": jnp.full((rows, 2), float(step)), "b": jnp.sin(jnp.arange(20_000.0))}
    return put(TrainState(jnp.int32(step), params, (jnp.int32(step),)), replicated(make_mesh()))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of the steps 1 to 5, of which 2 has the lowest loss."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, loss in enumerate((5.0, 1.0, 4.0, 3.0, 2.0), 1):
            checkpoints.save(state(step), {"next_batch": step}, loss)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def steps(folder):
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def restored(folder, which="last", **how):
    with Checkpoints(folder, **how) as checkpoints:
        found, data = checkpoints.restore(state(0), which)
    assert float(found.params["a"][0, 0]) == int(found.step) == data["next_batch"]
    return int(found.step)


def test_parameters_that_another_run_has_too(folder):
    """Those that it lacks stay, those that only it has are left out; each where it belongs."""
    place = replicated(make_mesh())
    params = put({"a": jnp.zeros((5, 2)), "new": jnp.ones(3)}, place)
    with Checkpoints(folder, writable=False) as checkpoints:
        found = checkpoints.restore_common(params)
        assert found.keys() == params.keys()
        assert (found["a"] == 5.0).all()
        assert found["a"].sharding == place
        assert (found["new"] == 1.0).all()
        with pytest.raises(UserError, match=r"params/a is \(5, 2\), expected \(4, 2\).* and ids"):
            checkpoints.restore_common({"a": jnp.zeros((4, 2))})
        with pytest.raises(UserError, match="none of the parameters"):
            checkpoints.restore_common({"new": jnp.ones(3)})
    with (
        Checkpoints(folder / "none") as checkpoints,
        pytest.raises(FileNotFoundError, match="no checkpoint; train first"),
    ):
        checkpoints.restore_common(params)


def test_the_latest_and_the_lowest_training_loss_are_kept(folder):
    assert steps(folder) == [2, 4, 5]
    assert restored(folder) == 5
    assert restored(folder, "lowest_training_loss") == 2
    with Checkpoints(folder, keep=2) as checkpoints:  # the losses are known to a later process
        checkpoints.save(state(6), {"next_batch": 6}, 1.5)
    assert steps(folder) == [2, 5, 6]
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(state(7), {"next_batch": 7}, 0.5)
    assert steps(folder) == [6, 7]
    with pytest.raises(ValueError, match=r"inference\.checkpoint is 'first'"):
        restored(folder, "first")


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 20)])
@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/_METADATA", "data/metadata"])
def test_a_damaged_checkpoint_falls_back_and_is_named(folder, file, damage, caplog):
    damage(folder / "5" / file)
    logging.get_absl_logger().addHandler(caplog.handler)
    try:
        with pytest.raises(CheckpointError, match="5 cannot be read .*: go on training"):
            restored(folder, writable=False)  # it would not be the step that a reader names
        assert steps(folder) == [2, 4, 5]  # a reader changes nothing
        assert restored(folder) == 4
    finally:
        logging.get_absl_logger().removeHandler(caplog.handler)
    assert f"{folder / '5'} cannot be read" in caplog.text
    assert steps(folder) == [2, 4]
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(5), {"next_batch": 5}, 2.0)
    assert restored(folder) == 5


def test_another_checkpoint_is_not_taken_for_the_best(folder):
    os.remove(folder / "4" / "data" / "metadata")
    with pytest.raises(CheckpointError, match="4 cannot be read .*: give inference.checkpoint=la"):
        restored(folder, "best", writable=False, best=4)


def test_what_a_killed_save_left_is_removed_by_the_next_writer(folder):
    left = folder / "6.orbax-checkpoint-tmp"
    shutil.copytree(folder / "5", left)
    (folder / "unreadable_3").mkdir()
    assert restored(folder, writable=False) == 5
    assert left.is_dir()  # a reader changes nothing
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(6), {"next_batch": 6}, 1.5)
    assert sorted(os.listdir(folder)) == ["2", "5", "6", "unreadable_3"]
    assert restored(folder) == 6


def test_a_lost_part_of_the_values_falls_back(folder):
    for name in os.listdir(folder / "5" / "state" / "d"):
        os.truncate(folder / "5" / "state" / "d" / name, 30)
    assert restored(folder) == 4


def flip_a_bit(checkpoint):
    """Of the parameter b, by far the largest."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)


def test_a_flipped_bit_falls_back(folder):
    flip_a_bit(folder / "5")
    assert restored(folder) == 4


def test_a_flipped_bit_of_a_parameter_that_another_run_begins_with(folder):
    flip_a_bit(folder / "5")
    params = put({"a": jnp.zeros((5, 2)), "b": jnp.zeros(20_000)}, replicated(make_mesh()))
    with Checkpoints(folder, writable=False) as checkpoints:
        assert (checkpoints.restore_common({"a": params["a"]})["a"] == 5.0).all()
        with pytest.raises(CheckpointError, match="the values of params/b are not those"):
            checkpoints.restore_common(params)


def test_when_nothing_can_be_read_that_is_an_error(folder):
    for step in steps(folder):
        os.remove(folder / str(step) / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[2, 4, 5\] can be read"):
        restored(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restored(folder)


def test_other_shapes_are_no_damage(folder):
    expected = r"a is \(5, 2\), expected \(6, 2\)"
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=expected):
        checkpoints.restore(state(0, rows=6))
    assert steps(folder) == [2, 4, 5]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run cannot be written to, .*\(Not a directory\)"):
        check_folder(tmp_path / "file" / "run", 0)
    if os.path.isdir("/proc/self"):  # a file system that nobody writes to, root neither
        with pytest.raises(ValueError, match=r"/proc/self/run cannot be written to"):
            check_folder(Path("/proc/self/run"), 0)
    check_folder(tmp_path / "run", 1000)
    assert os.listdir(tmp_path / "run") == []
    with pytest.raises(ValueError, match=r"3 checkpoints take 1000000000.00 GB: make room"):
        check_folder(tmp_path / "run", 10**18, "3 checkpoints")


def test_a_folder_in_which_folders_cannot_be_renamed_is_refused(tmp_path, monkeypatch):
    def rename(*_):
        raise OSError(errno.EMFILE, "Too many open files")  # as gcsfuse on a flat bucket does

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ValueError, match=r"run cannot .* be renamed \(Too many open files\)"):
        check_folder(tmp_path / "run", 0)


@pytest.mark.parametrize(
    ("steps", "keep", "there", "expected"),
    [
        (1000, 2, [], 4),  # two latest, the lowest loss, the one being written
        (1000, 2, [700, 800, 900], 1),
        (1000, 5, [], 7),
        (250, 5, [], 3),  # at 100, 200 and the end
        (1000, 2, [1000], 0),
    ],
)
def test_the_room_is_that_of_all_checkpoints_that_will_be_there(steps, keep, there, expected):
    training = TrainingFields(steps=steps, checkpoint_every=100, keep_checkpoints=keep)
    assert checkpoints_to_fit(training, there) == expected


def test_a_save_that_fails_without_a_message_is_explained(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError

    with Checkpoints(folder) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(CheckpointError, match=r"OSError: no message\)\. The last .* is step 5"):
            checkpoints.save(state(6), {"next_batch": 6}, 1.5)


@pytest.mark.parametrize("name", ["run [2]", "[draft"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"path with '\[' cannot be read again"):
        Checkpoints(tmp_path / name)
