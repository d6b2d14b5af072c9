"""A run that goes on, that begins, that someone else trains already; what its folder then says."""

import json
import os
import shutil
import sys
import time

import forked
import jax
import numpy as np
import pytest
from absl import logging
from tiny_workdir import make_config, make_workdir

from tca4rec_jax import train as training
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.lease import holder_of
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.train import train
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.state import Metrics


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


def experiment(workdir, name, steps=5, **optimizer):
    config = make_config(workdir, name)
    config.training.steps = steps
    config.optimizer.update(optimizer)
    return Experiment(config, workdir)


def test_more_steps_are_said_and_fewer_than_trained_refused(workdir, caplog):
    run = RunFolder.of(workdir, "longer")
    train(experiment(workdir, "longer", 4))
    with pytest.raises(UserError, match=r"has 4 steps, but training.steps is 3: give at least 4"):
        train(experiment(workdir, "longer", 3))
    logging.use_absl_handler()
    with caplog.at_level("WARNING", logger="absl"):
        train(experiment(workdir, "longer", 5))
    assert "training.steps was 4, is 5: after step 4 the learning rate follows" in caplog.text
    assert (run.trained_steps, run.steps, run.config["training"]["steps"]) == (5, 5, 5)
    assert [line["step"] for line in read_json_lines(run.path / "log.jsonl")] == list(range(5))
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.01, is 1.0"):
        train(experiment(workdir, "longer", 6, learning_rate=1.0))
    assert run.config["optimizer"]["learning_rate"] == 0.01


def test_a_start_that_fails_leaves_no_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(Experiment(make_config(tmp_path, "new"), tmp_path))
    assert (tmp_path / "llm" / "new").is_dir()
    assert RunFolder.all(tmp_path) == []


def test_a_run_that_has_no_checkpoint_yet_begins_anew(workdir):
    run = RunFolder.of(workdir, "early")
    run.begin(Provenance("LLM run", "x", {"training.steps": 9}), '{"old": 1}')
    train(experiment(workdir, "early", learning_rate=0.5))
    assert run.config["optimizer"]["learning_rate"] == 0.5
    assert run.made_from.inputs["optimizer.learning_rate"] == 0.5


def test_a_checkpoint_of_another_run_is_refused(workdir):
    for name, rate in (("one", 0.01), ("two", 0.02)):
        train(experiment(workdir, name, learning_rate=rate))
    one, two = (RunFolder.of(workdir, name) for name in ("one", "two"))
    shutil.rmtree(two.checkpoints)
    shutil.copytree(one.checkpoints, two.checkpoints)
    with pytest.raises(UserError, match="checkpoints is of another run than"):
        experiment(workdir, "two").trained_decoder("two")
    with pytest.raises(UserError, match="the checkpoint is of another run"):
        train(experiment(workdir, "two", learning_rate=0.02))


def test_a_damaged_config_is_named(workdir):
    train(experiment(workdir, "damaged"))
    path = workdir / "llm" / "damaged" / "config.json"
    for text in ("", "[]", path.read_text()[:100]):
        path.write_text(text)
        with pytest.raises(UserError, match=r"llm/damaged/config.json"):
            Experiment.of_run(workdir, "damaged")


def test_at_alpha_0_cf_logits_are_not_asked_for_and_change_nothing(workdir, tmp_path, monkeypatch):
    without = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(without / "cf")

    def trained(path):
        one = experiment(path, "plain")
        one.config.objective.alpha = 0.0
        return jax.tree.map(np.asarray, train(one).params)

    parameters = trained(without)
    with pytest.raises(UserError, match="there are no CF logits"):
        train(experiment(without, "aligned"))
    rising = experiment(without, "rising")
    rising.config.objective.update(alpha=0.0, alpha_last=0.5)
    with pytest.raises(UserError, match="there are no CF logits"):
        train(rising)
    monkeypatch.setattr(  # as if they were read
        training, "NoLogits", lambda _: experiment(workdir, "plain").cf_store("train_sequences")
    )
    jax.tree.map(np.testing.assert_array_equal, parameters, trained(workdir))


def train_in_process(workdir, out, seconds_a_step):
    """Trains the run 'twice', slowly; what it ends with goes to a file."""
    forked.keep_programs()
    write = TrainingLog.write

    def slowly(log, *args):
        time.sleep(seconds_a_step)
        return write(log, *args)

    TrainingLog.write = slowly
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process' own
    try:
        train(experiment(workdir, "twice", 12))
        out.write_text("done")
    except UserError as error:
        out.write_text(str(error))


def test_of_two_trainings_of_one_run_one_wins_and_nothing_is_damaged(workdir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    one = forked.start(train_in_process, workdir, first, 0.2)
    run, deadline = RunFolder.of(workdir, "twice"), time.monotonic() + 120
    while not run.trained_steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert holder_of(run.path).process == one.pid
    two = forked.start(train_in_process, workdir, second, 0.0)
    two.join(60)
    assert f"llm/twice is being written by process {one.pid} on " in second.read_text()
    one.join(60)
    assert first.read_text() == "done"
    assert [line["step"] for line in read_json_lines(run.path / "log.jsonl")] == list(range(12))
    assert run.trained_steps == 12
    assert holder_of(run.path) is None


@pytest.mark.parametrize("interrupted_at", [None, 5, 6, 7])
def test_the_loss_of_a_checkpoint_does_not_depend_on_interruptions(tmp_path, interrupted_at):
    losses = [8.0, 7.0, 6.0, float("nan"), 4.0, 3.0, 2.0, 1.0]
    path, means = tmp_path / "log.jsonl", {}
    starts = [0] if interrupted_at is None else [0, interrupted_at]
    for start, stop in zip(starts, [*starts[1:], 8], strict=True):
        how = {"total_steps": 8, "ideal_seconds_per_token": 1.0, "name": "run"}
        with TrainingLog(path, start=start, **how) as log:
            for step in range(start, stop):
                log.write(step, Metrics(losses[step], 1.0, 1.0), tokens=1)
                if (step + 1) % 3 == 0 or step + 1 == 8:
                    means[step + 1] = log.mean_loss(step + 1, every=3)
    assert means == {3: 7.0, 6: 3.5, 8: 1.5}
    path.write_text("")
    with TrainingLog(path, start=7, **how) as log:
        log.write(7, Metrics(1.0, 1.0, 1.0), tokens=1)
        assert log.mean_loss(8, every=3) == float("inf")  # not all of its losses are known
    assert json.loads(path.read_text())["step"] == 7
