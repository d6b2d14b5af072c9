"""Semantic ids in prompts: what is trained, what is refused, what a run depends on."""

import json

import jax
import numpy as np
import pytest
from recommenders.kinds import experiment_of, make_workdir_of
from tiny_workdir import make_workdir

from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_json, write_text
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.provenance import StaleError
from tca4rec_jax.train import train

NEW_ROWS, FROM_SCRATCH = "ids, new rows", "from scratch, ids"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "tiny").mkdir()
    make_workdir(path / "tiny")
    make_workdir_of(NEW_ROWS, path / "tiny", path / "workdir")
    return path / "workdir"


@pytest.mark.parametrize("held", ["ids", "lora"])
def test_rows_are_trained_beside_adapters_or_alone(workdir, held):
    changes = {f"{held}__train": False, "training__steps": 2}
    experiment = experiment_of(NEW_ROWS, workdir, f"without_{held}", **changes)
    first = jax.tree.map(np.asarray, experiment.initial_state()[1].params)
    last = train(experiment).params
    for part, section in (("new_rows", "ids"), ("adapters", "lora")):
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (first[part], last[part])), strict=True)
        ]
        assert any(changed) != (section == held)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (FROM_SCRATCH, {"llm__train": "lora"}, "every weight has to be trained: set llm.train"),
        (FROM_SCRATCH, {"prompt__item": "{title}"}, "knows the tokens of ids alone; set"),
        (FROM_SCRATCH, {"prompt__separator": "."}, "other texts than ids"),
        (NEW_ROWS, {"lora__train": False, "ids__train": False}, "nothing is trained"),
        (NEW_ROWS, {"ids__path": "no_such.json"}, r"no_such\.json"),
        (
            NEW_ROWS,
            {"training__tasks": ("{title}{id}",), "objective__softmax": "children"},
            "training.tasks needs logits of the whole vocabulary",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(workdir, kind, changes, message):
    with pytest.raises((UserError, FileNotFoundError), match=message):
        train(experiment_of(kind, workdir, "refused", **changes))


def test_new_rows_are_exported_in_a_merged_model_alone(workdir, tmp_path):
    experiment = experiment_of(NEW_ROWS, workdir, "any")
    given = {"dtype": "float32", "base_model": None}
    for kind in ("peft", "base"):
        with pytest.raises(UserError, match="new tokens.*give 'merged'"):
            export_decoder(
                tmp_path / kind, experiment.decoder, experiment.tokenizer, kind=kind, **given
            )
    folder = tmp_path / "merged"
    export_decoder(folder, experiment.decoder, experiment.tokenizer, kind="merged", **given)
    assert read_json(folder / "config.json")["vocab_size"] == experiment.new_tokens.stop
    opened = experiment_of(NEW_ROWS, workdir, "any", llm__weights=str(folder))
    assert not opened.new_tokens
    assert opened.items.written.values.tolist() == experiment.items.written.values.tolist()


def _other_ids(workdir, folder):
    """A file of as many tokens in another order."""
    listed = read_json(workdir / "ids" / "ids.json")
    listed["0"], listed["5"] = listed["5"], listed["0"]
    write_text(folder / "ids.json", json.dumps(listed))
    return str(folder / "ids.json")


def test_other_ids_are_another_input(workdir, tmp_path):
    before, other = (
        experiment_of(NEW_ROWS, workdir, "any", **changes).inference_inputs
        for changes in ({}, {"ids__path": _other_ids(workdir, tmp_path)})
    )
    assert {name for name in before if before[name] != other[name]} == {"ids"}


def test_a_run_is_not_started_from_one_of_other_ids(workdir, tmp_path):
    """Rows of new tokens go by their number, so as many of other ids would fit."""
    train(experiment_of(NEW_ROWS, workdir, "of_ids", training__steps=1))
    start = {"training__start_from": "of_ids", "training__steps": 1}
    other = experiment_of(
        NEW_ROWS, workdir, "other", ids__path=_other_ids(workdir, tmp_path), **start
    )
    with pytest.raises(StaleError, match=r"of_ids: .* made from other inputs: ids was \w+, is "):
        train(other)
    assert int(train(experiment_of(NEW_ROWS, workdir, "same", **start)).step) == 1
    texts = {"prompt__item": " {title}", "prompt__target": "", "prompt__separator": "z"}
    assert not experiment_of(NEW_ROWS, workdir, "texts", **start, **texts).ids
    train(experiment_of(NEW_ROWS, workdir, "texts", **start, **texts))
