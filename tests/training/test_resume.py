"""A run that is killed, stopped, moved to other devices or split over processes ends as if not.

Every run is a process of its own (tiny_run.py): the real loop, step, batches and checkpoints.
"""

import os
import random
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import tiny_run

from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.training.fault_tolerance import STOPPED
from tca4rec_jax.training.validation import validations_of

pytestmark = pytest.mark.slow


def finished(process, seconds=120) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def assert_same(folder, other, **tolerance):
    for a, b in zip(tiny_run.final(folder), tiny_run.final(other), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_line(path, number):
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) >= number)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run on one device."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert finished(tiny_run.start(folder)) == 0, tiny_run.output(folder)
    return folder


def test_killed_at_twenty_random_steps_it_ends_with_the_same_parameters(whole):
    folder, seed = whole.parent / "killed", random.randrange(10**6)
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, tiny_run.STEPS), 20))
    cut_short, killed, every = 0, 0, 3
    for step in steps:
        how = {"kill_at": step}
        if step % every == 0:  # that step's state is saved: while it is
            how = {"kill_in_save": (step, draw.uniform(0.0, 0.05))}
        process = tiny_run.start(folder, every=every, **how)
        status = finished(process)
        assert status in (0, -signal.SIGKILL), tiny_run.output(folder)
        killed += status != 0
        names = os.listdir(folder / "checkpoints")
        cut_short += any("tmp" in name for name in names)
        for name in names:  # orbax leaves what was cut short where it is
            if "tmp" in name:
                shutil.rmtree(folder / "checkpoints" / name)
    assert killed >= 15
    assert cut_short, "no kill fell into a save"
    assert finished(tiny_run.start(folder)) == 0, tiny_run.output(folder)
    assert_same(folder, whole)


def test_a_stop_signal_saves_the_step_and_the_run_goes_on(whole):
    folder = whole.parent / "stopped"
    process = tiny_run.start(folder, pace=0.05)
    wait_for_line(folder / "log.jsonl", 4)
    os.kill(process.pid, signal.SIGTERM)
    assert finished(process) == STOPPED, tiny_run.output(folder)
    assert "SIGTERM: stopped after step" in tiny_run.output(folder)
    lines = len((folder / "log.jsonl").read_text().splitlines())
    assert (folder / "checkpoints" / str(lines)).is_dir()
    assert finished(tiny_run.start(folder)) == 0
    assert_same(folder, whole)


def test_eight_devices_then_one_then_eight_are_like_eight(whole):
    split, straight = whole.parent / "split", whole.parent / "eight"
    assert finished(tiny_run.start(straight, devices=8, mesh=(2, 2, 2))) == 0
    for devices, mesh, steps in ((8, (2, 2, 2), 20), (1, (1, 1, 1), 40), (8, (2, 2, 2), 60)):
        process = tiny_run.start(split, devices=devices, mesh=mesh, steps=steps)
        assert finished(process) == 0, tiny_run.output(split)
    assert_same(split, straight, rtol=1e-5, atol=1e-5)
    assert_same(straight, whole, rtol=1e-3, atol=1e-4)


def test_two_processes_stop_together_and_end_like_one(whole):
    folder, one = whole.parent / "two", whole.parent / "two_devices"
    assert finished(tiny_run.start(one, devices=2)) == 0

    def both(**options):
        job = f"localhost:{free_port()}", 2
        return [tiny_run.start(folder, job=(*job, index), **options) for index in (0, 1)]

    processes = both(pace=0.05)
    wait_for_line(folder / "log.jsonl", 4)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finished(process) for process in processes] == [STOPPED] * 2
    assert (
        tiny_run.output(folder, 0).splitlines()[-1] == tiny_run.output(folder, 1).splitlines()[-1]
    )
    assert [finished(process) for process in both()] == [0, 0], tiny_run.output(folder)
    assert_same(folder, one, rtol=1e-6, atol=1e-7)


def test_two_processes_stop_together_in_a_validation_and_choose_like_one(whole):
    folder, one = whole.parent / "two_validate", whole.parent / "validate"
    options = {"validate_every": 4, "steps": 12}
    assert finished(tiny_run.start(one, devices=2, kill_at=(8, 1), **options)) == -signal.SIGKILL
    assert finished(tiny_run.start(one, devices=2, **options)) == 0, tiny_run.output(one)
    assert "validates 4" not in tiny_run.output(one)

    def both(**more):
        job = f"localhost:{free_port()}", 2
        given = options | more
        return [tiny_run.start(folder, job=(*job, index), **given) for index in (0, 1)]

    log, processes = (
        folder / "1.out",
        both(batch_pace=1.0),
    )  # JAX looks for the signal once a second
    wait_for(lambda: log.exists() and "validates 4 0" in log.read_text())
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finished(process) for process in processes] == [STOPPED] * 2
    assert "stopped after step 4 of 12" in tiny_run.output(folder, 1)
    assert (folder / "checkpoints" / "4").is_dir()
    assert [finished(process) for process in both()] == [0, 0], tiny_run.output(folder)
    found = [validations_of(read_json_lines(path / "log.jsonl")) for path in (one, folder)]
    assert list(found[0]) == list(found[1]) == [4, 8, 12]
    for of_one, of_two in zip(*(each.values() for each in found), strict=True):
        assert of_two["nll"] == pytest.approx(of_one["nll"], rel=1e-6)
    assert_same(folder, one, rtol=1e-6, atol=1e-7)


def test_a_damaged_latest_checkpoint_is_passed_over(whole):
    folder = whole.parent / "damaged"
    assert finished(tiny_run.start(folder, steps=30)) == 0
    os.truncate(folder / "checkpoints" / "30" / "state" / "manifest.ocdbt", 50)
    assert finished(tiny_run.start(folder)) == 0, tiny_run.output(folder)
    assert "checkpoints/30 cannot be read" in tiny_run.output(folder)
    assert (folder / "checkpoints" / "unreadable_30").is_dir()
    assert_same(folder, whole)


def test_a_loss_that_is_not_finite_names_its_row_and_saves_the_state_before(whole):
    folder, row = whole.parent / "not_finite", 17
    position = int(tiny_run.sequences().last_positions[row])
    process = tiny_run.start(folder, not_finite=[position])
    assert finished(process) == 1, tiny_run.output(folder)
    message = tiny_run.output(folder)
    assert f"to blame is row {row} (user {100 + row}). The state before it is saved" in message
    step = len((folder / "log.jsonl").read_text().splitlines()) - 1
    assert f"FloatingPointError: step {step} has the loss nan" in message
    assert (folder / "checkpoints" / str(step)).is_dir()
    assert finished(tiny_run.start(folder)) == 0  # the row is mended
    assert_same(folder, whole)


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(whole):
    folder, other = whole.parent / "full", whole.parent / "not_full"
    # Each array of a checkpoint is more than the limit, the log is not.
    larger = {"rank": 256, "steps": 12, "every": 3}
    assert finished(tiny_run.start(other, **larger)) == 0
    process = tiny_run.start(folder, small_files_at=10, **larger)
    assert finished(process) == 1
    message = tiny_run.output(folder)
    assert "CheckpointError" in message
    assert "File too large" in message
    assert re.search(r"The last complete one is step [69], it is intact", message)
    assert finished(tiny_run.start(folder, **larger)) == 0, tiny_run.output(folder)
    assert_same(folder, other)
