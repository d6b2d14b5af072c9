"""What launch/status.py shows of a work directory, before and after its parts change."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from forked import Script
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.dataset import load, prepare
from tca4rec_jax.decoding.recommend_file import recommend_file
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.lease import only_writer
from tca4rec_jax.provenance import FILE, Provenance
from tca4rec_jax.status import Status
from tca4rec_jax.train import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A work directory with a run, its lists, an export named like markup and hidden states."""
    path = tmp_path_factory.mktemp("made")
    make_workdir(path)
    config = make_config(path, "named")
    config.lora.first_layer = 1
    config.training.cache_hidden_states = True
    config.evaluation.variants += (("guided", "named", 1.0),)
    experiment = Experiment(config, path)
    train(experiment)
    evaluate_run(config, path)
    run = experiment.check_run("named")
    (path / "[red]").mkdir()
    inputs = {"run": run.made_from.inputs, "run.name": "named", "run.step": 5}
    Provenance("export", "launch/export.py", inputs).save(path / "[red]")
    return path


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def states(workdir):
    rows = Status(workdir).rows()
    return {path: str(cells["state"]) for path, cells in rows.items()}


def test_everything_is_there_and_nothing_stale(workdir):
    rows = Status(workdir).rows()
    stores = {f"cf/logits/{split}" for split in ("train", "train_sequences", "validation", "test")}
    hidden = {f"llm/{path.name}" for path in (workdir / "llm").glob("hidden_states_*")}
    assert len(hidden) == 1
    assert stores | hidden | {"data", "cf/checkpoint.npz", "llm/named", "[red]"} <= set(rows)
    lists = [path for path in rows if path.startswith("evaluation/named_")]
    assert [rows[path]["what"] for path in (*lists, "results.json")] == [
        "evaluation list",
        "evaluation",
    ]
    assert not [path for path, cells in rows.items() if "stale" in cells["state"]]
    assert rows["llm/named"]["made from"] == f"{rows_weights(workdir)}, alpha 0.1"
    assert rows["llm/named"]["state"] == "5 steps"
    assert {cells["made anew with"] for cells in rows.values()} == {None}
    assert rows["[red]"]["made from"] == "named"


def rows_weights(workdir):
    return json.loads((workdir / "llm" / "named" / "config.json").read_text())["llm"]["weights"]


def test_other_data_make_everything_stale_but_themselves(workdir):
    text = (workdir / "items.csv").read_text()
    (workdir / "items.csv").write_text(text.replace("3,da", "3,dz"))
    shutil.rmtree(workdir / "data")
    prepare(make_config(workdir, "x").data, workdir / "data")
    found = states(workdir)
    assert found["data"] == "up to date"
    assert "catalogue was " in found["cf/checkpoint.npz"]
    assert "stale: written for other data (catalogue_hash)" in found["cf/logits/test"]
    assert "catalogue was " in found["llm/named"]
    rows = Status(workdir).rows()
    assert rows["llm/named"]["made anew with"] == "launch/train.py --config.run=named"


def test_a_run_says_who_trains_it_and_trained_anew_makes_its_exports_stale(workdir):
    with only_writer(workdir / "llm" / "named"):
        found = states(workdir)["llm/named"]
    assert found.startswith(f"5 steps, being written by process {os.getpid()} on ")
    path = workdir / "llm" / "named" / FILE
    record = json.loads(path.read_text())
    record["inputs"] |= {"training.steps": 9, "seed": 7}
    path.write_text(json.dumps(record))
    found = states(workdir)
    assert Status(workdir).rows()["llm/named"]["made anew with"] is not None
    lists = [state for path, state in found.items() if path.startswith("evaluation/named_")]
    for state in (*lists, found["results.json"]):
        assert "which no run is now" in state
    assert "run.seed was 0, is 7" in found["[red]"]


def test_another_cf_model_makes_stale_what_ranked_with_it_and_no_list_without(workdir):
    (workdir / "histories.jsonl").write_text('{"history": ["0", "1"]}\n')
    experiment = Experiment.of_run(workdir, "named")
    for guidance, name in ((0.0, "plain"), (1.0, "guided")):
        recommender = Recommender(experiment, "named", guidance=guidance)
        recommend_file(recommender, workdir / "histories.jsonl", workdir / f"{name}.jsonl", k=1)
    files = {name: f"{name}.jsonl.{FILE}" for name in ("plain", "guided")}
    assert {states(workdir)[file] for file in files.values()} == {"up to date"}
    shutil.rmtree(workdir / "cf")
    config = make_config(workdir, "named").cf
    config.update(model="bpr_mf", max_epochs=1)
    run_cf(config, load(workdir / "data"), workdir, history_length=4)
    found = states(workdir)
    no_store = "stale: CF logits was [0-9a-f]{12}, which no store is now"
    assert re.fullmatch(no_store, found["results.json"])
    assert re.fullmatch(no_store, found["rankings.npz"])
    lists = {path.split("/")[1].split("_")[0]: path for path in found if path.startswith("eval")}
    assert re.fullmatch(no_store, found[lists["named"]])
    assert found[lists["untrained"]] == found[files["plain"]] == "up to date"
    assert re.fullmatch("stale: CF model was [0-9a-f]{12}, is [0-9a-f]{12}", found[files["guided"]])


def test_damaged_parts_are_shown_as_such(workdir):
    (workdir / "cf" / "logits" / "test" / "manifest.json").write_text("{")
    (workdir / "llm" / "named" / "config.json").write_text("{")
    (workdir / "[red]" / FILE).write_text("{")
    shutil.rmtree(workdir / "data")
    found = states(workdir)
    assert "logits/test/manifest.json: not" in found["cf/logits/test"]
    assert "llm/named/config.json: not" in found["llm/named"]
    assert "provenance.json" in found["[red]"]
    assert "data" not in found
    assert "there are no prepared data" in found["cf/logits/train"]


def test_the_script_prints_the_table_without_markup(workdir, tmp_path):
    command = [f"{ROOT}/launch/status.py", f"--workdir={workdir}"]
    done = Script(command, {}).completed()
    assert done.returncode == 0, done.stderr
    assert "[red]" in done.stdout
    assert "5 steps" in done.stdout
    (tmp_path / "empty").mkdir()
    empty = Script([command[0], f"--workdir={tmp_path}/empty"], {}).completed()
    assert "holds nothing yet: begin with launch/prepare_data.py" in empty.stdout
    missing = Script([command[0], f"--workdir={tmp_path}/none"], {}).completed()
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
