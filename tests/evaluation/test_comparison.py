"""What an evaluation compares, by the config or by name; results that are not replaced."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from absl import logging

from tca4rec_jax.config import default_config
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import (
    Comparison,
    by_name,
    check_same_comparison,
    comparison,
    results_folder,
)
from tca4rec_jax.provenance import Provenance

STATES = {"aligned": "", "begun": "2 of 5 steps", "other": "", "plain": ""}
RUNS = {name: SimpleNamespace(unfinished=state) for name, state in STATES.items()}


@pytest.fixture
def experiment(tmp_path):
    def check_run(name, *, guided=False):
        if name == "other":
            raise UserError("lora.rank was 8, is 16")

    return SimpleNamespace(
        config=default_config(), workdir=tmp_path, runs=RUNS, check_run=check_run
    )


def test_the_table_begins_with_what_every_model_is_compared_to(experiment):
    evaluation = experiment.config.evaluation
    evaluation.variants = (("LLM", "plain", 0.0), ("guided", "plain", 1.0), ("as it came", "", 0.0))
    evaluation.differences = (("guided", "CF model"),)
    found = comparison(experiment)
    assert found == (evaluation.variants, evaluation.differences)
    assert found.labels == ["Most popular", "CF model", "LLM", "guided", "as it came"]
    assert found.guidances == {"plain": {"LLM": 0.0, "guided": 1.0}, "": {"as it came": 0.0}}


@pytest.mark.parametrize("label", ["LLM", "CF model", "Most popular"])
def test_two_rows_of_one_label_are_refused(label):
    variants = (("LLM", "run", 0.0), (label, "other", 0.0))
    with pytest.raises(UserError, match=f"evaluation.variants: the label '{label}' .* two rows"):
        Comparison(variants, ()).check()


def test_a_difference_of_what_is_not_in_the_table_is_refused():
    with pytest.raises(UserError, match=r"evaluation.differences names \['aligned'\]"):
        Comparison((("LLM", "run", 0.0),), (("LLM", "aligned"),)).check()


def test_differences_follow_from_the_names():
    variants, differences = by_name(["plain", "aligned", "untrained"], [0.0, 1.0])
    assert variants == (
        ("plain", "plain", 0.0),
        ("plain, lambda = 1", "plain", 1.0),
        ("aligned", "aligned", 0.0),
        ("aligned, lambda = 1", "aligned", 1.0),
        ("untrained", "", 0.0),
        ("untrained, lambda = 1", "", 1.0),
    )
    assert differences == (
        ("CF model", "Most popular"),
        ("plain", "untrained"),
        ("plain, lambda = 1", "plain"),
        ("plain, lambda = 1", "CF model"),
        ("aligned", "plain"),
        ("aligned", "untrained"),
        ("aligned, lambda = 1", "aligned"),
        ("aligned, lambda = 1", "CF model"),
        ("untrained, lambda = 1", "untrained"),
        ("untrained, lambda = 1", "CF model"),
    )
    alone = by_name(["plain"], [2.0]).check()
    assert alone.differences[1:] == (("plain, lambda = 2", "CF model"),)


def test_without_names_all_finished_runs_that_fit_are_compared(experiment, caplog):
    logging.use_absl_handler()
    found = comparison(experiment)
    assert list(found.guidances) == ["aligned", "plain", ""]
    assert "The run 'begun' is left out: 2 of 5 steps" in caplog.text
    assert "The run 'other' is left out: lora.rank was 8, is 16" in caplog.text


def test_runs_by_name_take_the_place_of_those_of_the_config(experiment):
    experiment.config.evaluation.variants = (("LLM", "plain", 0.0), ("guided", "plain", 1.0))
    experiment.config.evaluation.differences = (("guided", "LLM"),)
    assert list(comparison(experiment, ["aligned"]).guidances) == ["aligned"]
    labels = ["plain", "plain, lambda = 0.5"]
    assert comparison(experiment, guidances=[0.5, 0.0]).labels[2:] == labels


@pytest.mark.parametrize("by_flag", [True, False])
def test_an_unknown_run_is_answered_with_those_that_are_there(experiment, by_flag):
    if not by_flag:
        experiment.config.evaluation.variants = (("LLM", "alinged", 0.0),)
    with pytest.raises(UserError) as error:
        comparison(experiment, ["plain", "alinged"] if by_flag else [])
    assert "llm has no run 'alinged'" in str(error.value)
    assert "'aligned', 'begun' (2 of 5 steps), 'other', 'plain', 'untrained'" in str(error.value)
    with pytest.raises(UserError, match="lora.rank"):
        comparison(experiment, ["other"])


def test_results_of_another_comparison_are_not_replaced(tmp_path):
    def made_from(runs, seed=0):
        return Provenance("evaluation", "", {"compared": {"runs": runs}, "seed": seed})

    path = results_folder(tmp_path, "") / "results.json"
    check_same_comparison(path, made_from(["plain"]))
    path.write_text(json.dumps({"provenance": dataclasses.asdict(made_from(["plain"]))}))
    check_same_comparison(path, made_from(["plain"], seed=1))  # of the same runs, made anew
    with pytest.raises(UserError, match=r"\(runs was \['plain'\], is \[\]\): give .* --name"):
        check_same_comparison(path, made_from([]))
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="it does not say what it compares"):
            check_same_comparison(path, made_from(["plain"]))


def test_results_have_a_folder_by_name(tmp_path):
    assert results_folder(tmp_path, "guided") == tmp_path / "results" / "guided"
    for name in ("..", "a/b"):
        with pytest.raises(UserError, match="--name"):
            results_folder(tmp_path, name)
