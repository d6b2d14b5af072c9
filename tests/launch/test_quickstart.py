"""The launch scripts one after the other, on the quickstart's debug config."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import Script

from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.evaluation.rankings import sample_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def command(script, workdir, setting="debug", *flags):
    config = f"--config={ROOT}/configs/quickstart.py:{setting}"
    return [sys.executable, f"{ROOT}/launch/{script}.py", config, f"--workdir={workdir}", *flags]


def run(*args):
    """As from a shell."""
    done = subprocess.run(command(*args), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(*args):
    """Scripts that are shown to start from a shell elsewhere are forked from a server."""
    return Script(command(*args)[1:], dict(os.environ))


def finish(*args):
    done = start(*args).completed()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Prepared data, a CF model and one uninterrupted LLM run."""
    path = tmp_path_factory.mktemp("quickstart")
    finish("prepare_data", path)
    run("train_cf", path)
    run("train", path, "debug,run=plain")
    return path


@pytest.fixture(scope="module")
def evaluated(workdir):
    """What the evaluation found."""
    finish("train", workdir, "debug,run=aligned,validation.every=6,validation.rows=3")
    run("evaluate", workdir)
    return json.loads((workdir / "results.json").read_text())


STUB = """#!/usr/bin/env bash
echo "$*" >> commands
for flag in "$@"; do
  case "$flag" in --html=*) mkdir -p results/first_look && touch "${flag#--html=}" ;; esac
done
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """launch/quickstart.sh where Python only writes down what it is to do; gives (stdout, that)."""
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in ("launch", ".venv/bin"):
        (checkout / folder).mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "quickstart.sh", checkout / "launch")
    (checkout / "launch" / "setup.sh").write_text("")
    (checkout / ".venv" / "bin" / "python").write_text(STUB)
    (checkout / ".venv" / "bin" / "python").chmod(0o755)

    def run():
        (checkout / "commands").write_text("")
        done = subprocess.run(
            ["bash", "launch/quickstart.sh", ".", "debug"],
            cwd=checkout, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout, (checkout / "commands").read_text().splitlines()

    return run


def test_the_quickstart_has_a_first_result_before_the_full_comparison(quickstart):
    told, commands = quickstart()
    scripts = [command.split(".py", 1)[0].removeprefix("launch/") for command in commands]
    first = ["prepare_data", "train_cf", "train", "evaluate", "explain"]
    assert scripts == [*first, "train", "evaluate"]
    assert "run=aligned" in commands[2]
    assert "alpha=0,run=plain" in commands[5]
    assert told.index("5/7") < told.index("the first result after 0 min ") < told.index("6/7")
    told_again, again = quickstart()
    assert again == [*commands[:3], *commands[5:]]
    assert "the first result after 0 min" not in told_again
    assert "--config.evaluation.rows=60" in commands[3]
    assert "--row=2501" in commands[4]
    of_root = [re.sub(r"(?=launch/|configs/)", f"{ROOT}/", command) for command in commands]
    checks = [Script([*one.split(), "--dry_run"], dict(os.environ)) for one in of_root]
    assert not [one.stderr for one in map(Script.completed, checks) if one.returncode]
    shown = np.random.default_rng(0).permutation(60)[0]  # the first example, as evaluate draws it
    assert sample_rows(9057, 60, seed=0)[shown] == 2501


def log_lines(workdir, name):
    path = workdir / "llm" / name / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_run_trains_no_more_and_evaluation_reports(workdir, evaluated):
    before = log_lines(workdir, "plain")
    finish("train", workdir, "debug,run=plain")
    assert log_lines(workdir, "plain") == before
    done = start("train", workdir, "debug,run=plain,alpha=0.25").completed()
    assert done.returncode == 1
    assert "objective.alpha was 0.9, is 0.25" in done.stderr
    results = evaluated
    assert set(results["models"]) >= {"Most popular", "CF model", "LLM, untrained"}
    for model in results["models"].values():
        metrics = model["by item"]
        assert 0 <= metrics["ndcg@3"]["mean"] <= metrics["hr@3"]["mean"] <= 1
    likely = {label: model["nll per title"] for label, model in results["models"].items()}
    assert likely.pop("LLM, alpha > 0, guided") is None  # guided scores are no distribution
    for nll in likely.values():
        assert 0 < nll["best"]["mean"] <= nll["temperature 1"]["mean"]
    assert likely["CF model"]["best"]["mean"] < np.log(results["items"])
    difference = results["differences"]["LLM, alpha = 0 - LLM, untrained"]["nll per title"]
    assert difference["mean"] == pytest.approx(
        likely["LLM, alpha = 0"]["best"]["mean"] - likely["LLM, untrained"]["best"]["mean"]
    )
    for file in ("results.md", "results.png", "training.png", "examples.md", "report.html"):
        assert (workdir / file).stat().st_size > 100


def test_recommending_with_a_trained_run_and_sweeping_its_guidance(workdir):
    flags = ("--item=Toy Story (1995)", "--item=100", "--k=3", "--guidance=1")
    setting = "debug,run=plain,decoding.exclude_history=True"
    lines = run("recommend", workdir, setting, *flags).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert not any("Toy Story" in line for line in lines)
    with pytest.raises(FileNotFoundError, match=r"absent.config\.json does not exist"):
        Recommender.load(workdir, "absent")
    loaded = Recommender.load(workdir, "plain", guidance=1.0)
    assert [len(found) for found in loaded.recommend([["Toy Story (1995)"], ["100"]], k=2)] == [
        2,
        2,
    ]
    run("sweep_guidance", workdir, "debug,run=plain", "--guidances=0.5,100")
    models = json.loads((workdir / "sweep_plain.json").read_text())["models"]
    assert list(models) == ["lambda = 0", "lambda = 0.5", "lambda = 100", "CF model"]
    for file in ("sweep_plain.md", "sweep_plain.png"):
        assert (workdir / file).stat().st_size > 100


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("debug,alpha=1.5", "objective.alpha is 1.5"),
        ("debug,training.batch_size=3,mesh.data=2", "training.batch_size is 3"),
        ("debug,prompt.max_tokens=10000,training.buckets=(16384,)", "prompt.max_tokens is 10000"),
        ("debug,prompt.max_tokens=20", "the budget is 20 with a prefix"),
    ],
)
def test_bad_fields_end_the_run_before_it_begins(workdir, setting, message):
    done = start("train", workdir, setting + ",run=bad").completed()
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not log_lines(workdir, "bad")
