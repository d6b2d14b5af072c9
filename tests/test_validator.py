"""Validation while training: what it finds, what follows, and that it changes nothing else."""

import dataclasses
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from tiny_workdir import make_config, make_workdir

from tca4rec_jax import train as training
from tca4rec_jax.config import default_config
from tca4rec_jax.config_checks import validate
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.status import Status
from tca4rec_jax.train import train
from tca4rec_jax.training.fault_tolerance import Stopped
from tca4rec_jax.training.log import TrainingLog
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.validation import Outcome, ValidationConfig, validations_of
from tca4rec_jax.validator import Validator


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


def experiment(workdir, name, **validation):
    config = make_config(workdir, name)
    config.validation.update({"every": 2, "rows": 12, **validation})
    config.inference.update({"checkpoint": "best", "batch_size": 4})
    return Experiment(config, workdir)


def found(run):
    """{step: metrics} of the log, without the seconds."""
    validations = validations_of(read_json_lines(run.log))
    return {step: values | {"seconds": 0} for step, values in validations.items()}


@pytest.fixture(scope="module")
def whole(workdir):
    """A run that was validated and never interrupted, and its last parameters."""
    state = train(experiment(workdir, "whole"))
    return RunFolder.of(workdir, "whole"), jax.tree.map(np.asarray, state.params)


def test_validation_changes_no_parameter_and_finds_what_evaluation_finds(workdir, whole):
    run, params = whole
    plain = train(experiment(workdir, "plain", every=0))
    jax.tree.map(np.testing.assert_array_equal, params, plain.params)
    validations = found(run)
    assert list(validations) == [2, 4, 5]
    best = run.outcome.best
    assert validations[best]["nll"] == min(one["nll"] for one in validations.values())
    config = experiment(workdir, "whole").config
    config.evaluation.update({"split": "validation", "rows": 12})
    config.evaluation.variants = (("best", "whole", 0.0),)
    results = evaluate_run(config, workdir, name="validated")
    assert results["runs"] == {"whole": best}
    metrics = results["models"]["best"]
    assert metrics["nll per title"]["best"].mean == pytest.approx(validations[best]["nll"])
    for name in ("hr@1", "hr@3", "ndcg@3"):
        assert metrics["by item"][name].mean == validations[best][name]
    with pytest.raises(UserError, match="'best' by validation, but none was made"):
        evaluate_run(experiment(workdir, "plain").config, workdir, runs=["plain"], name="x")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_programs_are_compiled_by_the_first_validation(workdir, monkeypatch, kind):
    compiled, counts, of_states = [], [], Validator.of_states

    def listener(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def counting(*args):
        validation = of_states(*args)

        def counted(*args):
            before = len(compiled)
            values = validation.metrics_of(*args)
            counts.append(len(compiled) - before)
            return values

        return dataclasses.replace(validation, metrics_of=counted)

    monkeypatch.setattr(Validator, "of_states", counting)
    jax.monitoring.register_event_duration_secs_listener(listener)
    one = experiment(workdir, f"compiled_{kind}")
    one.config.llm.train, one.config.inference.batch_size = kind, {"lora": 2, "full": 6}[kind]
    train(one)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize(
    ("how", "step", "batch"), [("killed", 4, 1), ("stopped", 4, 2), ("killed", 5, 1)]
)
def test_cut_short_in_the_middle_of_a_validation_it_chooses_the_same(
    workdir, whole, monkeypatch, how, step, batch
):
    """After a batch of 4 of the 12 rows, or two, of the second or the last validation."""
    name, before = f"{how}_{step}", [other for other in (2, 4) if other < step]
    call = Validator.__call__

    def cut_short(self, decoder, after_batch):
        done = iter(range(1, 9))

        def after():
            if list(found(RunFolder.of(workdir, name))) == before and next(done) == batch:
                if how == "killed":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)
            after_batch()

        return call(self, decoder, after)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", cut_short)
        with pytest.raises((KeyboardInterrupt, Stopped), match="^$|after step 4 of 5"):
            train(experiment(workdir, name))
    run, (expected, params) = RunFolder.of(workdir, name), whole
    assert (run.trained_steps, list(found(run))) == (step, before)
    assert run.unfinished == {4: "4 of 5 steps", 5: "5 of 5 steps, the last not validated"}[step]
    assert Status(workdir).rows()[f"llm/{name}"]["state"].startswith(run.unfinished)
    state = train(experiment(workdir, name))
    assert found(run) == found(expected)
    assert run.outcome == expected.outcome
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_patience_ends_a_run_which_is_finished_then(workdir):
    """No gain is enough after the first validation."""
    settings = {"min_gain": 1e6, "patience": 1, "metric": "ndcg@3 by title"}
    one = experiment(workdir, "patient", **settings)
    state, run = train(one), RunFolder.of(workdir, "patient")
    assert (int(state.step), list(found(run)), run.unfinished) == (4, [2, 4], "")
    assert run.outcome == Outcome(2, 1, True)
    assert run.drawn[-2:] == ["validation/nll", "validation/ndcg@3 by title"]
    assert {name.removeprefix("validation/") for name in run.drawn[-2:]} < found(run)[2].keys()
    assert one.run_step("patient") == 2
    one.check_run("patient")
    assert (
        Status(workdir).rows()["llm/patient"]["state"]
        == "4 of 5 steps, ended by validation, best 2"
    )
    log = run.log.read_text()
    assert int(train(experiment(workdir, "patient", **settings)).step) == 4
    assert run.log.read_text() == log
    for other, said in (
        ({"patience": 2}, "patience was 1, is 2"),
        ({"every": 0}, "every was 2, is"),
    ):
        with pytest.raises(UserError, match=f"validation.{said}"):
            train(experiment(workdir, "patient", **settings | other))
    assert run.unfinished == ""


def test_a_validation_whose_checkpoint_is_not_there_counts_for_nobody(tmp_path):
    """Killed after the line of step 4, while its checkpoint was being written."""
    run = RunFolder(tmp_path)
    inputs = {"training.steps": 5, "validation.every": 2, "validation.patience": 1}
    Provenance("LLM run", "x", inputs).save(tmp_path)
    (run.checkpoints / "2").mkdir(parents=True)
    run.log.write_text("".join(f'{{"step": {n}, "validation/nll": {n}}}\n' for n in (2, 4)))
    assert (run.outcome, run.unfinished) == (Outcome(2, 0, False), "2 of 5 steps")
    (run.checkpoints / "4").mkdir()
    assert (run.outcome, run.unfinished) == (Outcome(2, 1, True), "")


def test_the_best_checkpoint_is_kept_and_the_first_of_equals(workdir):
    one = experiment(workdir, "kept", every=1, min_gain=1e6)
    one.config.training.update({"keep_checkpoints": 1, "checkpoint_every": 10})
    train(one)
    assert RunFolder.of(workdir, "kept").saved_steps == [1, 5]
    assert one.run_step("kept") == 1
    shutil.rmtree(RunFolder.of(workdir, "kept").checkpoints / "1")
    with pytest.raises(UserError, match="that of step 1 is not there"):
        one.run_step("kept")


def test_a_line_of_a_later_step_than_the_checkpoint_is_dropped(tmp_path):
    path, how = tmp_path / "log.jsonl", {"total_steps": 9, "ideal_seconds_per_token": 1.0}
    with TrainingLog(path, start=0, name="run", **how) as log:
        for step in (2, 4, 6):
            log.write_validation(step, {"nll": float(step)}, "nll")
    with TrainingLog(path, start=4, name="run", **how) as log:
        assert {step: one["nll"] for step, one in log.validations.items()} == {2: 2.0, 4: 4.0}
    assert list(validations_of(read_json_lines(path))) == [2, 4]


@pytest.mark.parametrize(
    ("metric", "min_gain", "patience", "values", "expected"),
    [
        ("nll", 0.0, 0, [], Outcome(None, 0, False)),
        ("nll", 0.0, 2, [5.0, 4.0, 4.5, 4.0], Outcome(2, 2, True)),
        ("nll", 0.0, 3, [5.0, 4.0, 4.5, 4.0], Outcome(2, 2, False)),
        ("nll", 0.5, 2, [5.0, 4.6, 4.4], Outcome(3, 0, False)),  # 0.6 from the best
        ("nll", 0.0, 2, [np.nan, 5.0, np.nan], Outcome(2, 1, False)),
        ("hr@3", 0.0, 2, [np.nan, 0.0, 0.1], Outcome(3, 0, False)),
        ("hr@3", 0.0, 1, [0.0, 0.1, 0.2], Outcome(3, 0, False)),
        ("hr@3", 0.1, 2, [0.0, 0.1, 0.05], Outcome(1, 2, True)),
    ],
)
def test_what_follows(metric, min_gain, patience, values, expected):
    config = ValidationConfig(1, metric=metric, min_gain=min_gain, patience=patience)
    validations = {step: {metric: value} for step, value in enumerate(values, 1)}
    assert Outcome.of(config, validations) == expected


def test_fractions_of_an_epoch_are_steps():
    half = ValidationConfig(every_epochs=0.5)
    assert [half.steps(per_epoch) for per_epoch in (1, 10, 625)] == [1, 5, 312]
    assert half.is_on
    assert not dataclasses.replace(half, every_epochs=0.0).is_on


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"every": 5, "every_epochs": 0.5},
            "validation.every is 5 and validation.every_epochs 0.5",
        ),
        ({"metric": "auc"}, "validation.metric is 'auc': expected 'nll', or such as 'ndcg@10'"),
        ({"metric": "hr@0"}, "validation.metric is 'hr@0'"),
        ({"every": 5, "metric": "hr@3", "beams": 2}, "'hr@3', but its search has 2 beams"),
        ({"min_gain": -1.0}, "validation.min_gain is -1.0: expected at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    config = default_config()
    config.validation.update(fields)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_metric_that_every_candidate_reaches_is_refused():
    config = default_config()
    config.validation.update({"every": 5, "metric": "hr@5"})
    config.evaluation.candidates = 5
    with pytest.raises(UserError, match="'hr@5', which all evaluation.candidates=5 reach"):
        validate(config)
    config.validation.every = 0
    validate(config)


def test_answers_are_not_validated_and_that_is_said_before_any_work(workdir, monkeypatch):
    monkeypatch.setattr(training, "load_batches", None)
    one = experiment(workdir, "answers")
    one.config.recommender.name = "answer"
    with pytest.raises(UserError, match="recommender.name is 'answer', whose answers are not"):
        train(one)
    assert not RunFolder.of(workdir, "answers").config_path.exists()
