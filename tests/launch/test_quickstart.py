"""The launch scripts one after the other, on the quickstart's debug config; kill and resume."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import Script

from tca4rec_jax.decoding.recommender import Recommender

ROOT = Path(__file__).parents[2]
STEPS = 6
VALIDATED = f"validation.every={STEPS},validation.rows=3"  # two rows and one of two processes
# Fusions as users have them: the old way rounds otherwise on two devices than on one of each.
FLAGS = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=true"
ENVIRONMENT = os.environ | {"XLA_FLAGS": FLAGS}
pytestmark = pytest.mark.slow


def command(script, workdir, setting="debug", *flags):
    config = f"--config={ROOT}/configs/quickstart.py:{setting}"
    return [sys.executable, f"{ROOT}/launch/{script}.py", config, f"--workdir={workdir}", *flags]


def run(*args):
    """As from a shell."""
    done = subprocess.run(
        command(*args), capture_output=True, text=True, timeout=600, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(*args, devices=0):
    """Scripts that are shown to start from a shell elsewhere are forked from a server."""
    return Script(command(*args)[1:], ENVIRONMENT, devices)


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
    """What the evaluation in one process found."""
    finish("train", workdir, f"debug,run=aligned,{VALIDATED}")
    run("evaluate", workdir)
    return json.loads((workdir / "results.json").read_text())


def start_two(workdir, script, setting="debug"):
    """Two processes of a device each, as on two hosts."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{one.getsockname()[1]}"
    flags = (coordinator, "--process_count=2")
    return [
        start(script, workdir, setting, *flags, f"--process_index={index}", devices=1)
        for index in (0, 1)
    ]


def wait_for_line(workdir, name, number):
    deadline = time.monotonic() + 300
    while len(log_lines(workdir, name)) < number and time.monotonic() < deadline:
        time.sleep(0.01)


def log_lines(workdir, name):
    path = workdir / "llm" / name / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def final_state(workdir, name):
    checkpoint = workdir / "llm" / name / "checkpoints" / str(STEPS) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(checkpoint))


def test_a_run_that_is_killed_twice_ends_with_the_same_parameters(workdir):
    name, kill_after = "killed", sorted(random.sample(range(1, STEPS), 2))
    for steps in kill_after:
        process = start("train", workdir, f"debug,run={name}")
        wait_for_line(workdir, name, steps)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before step {steps}"
    finish("train", workdir, f"debug,run={name}")

    whole, resumed = final_state(workdir, "plain"), final_state(workdir, name)
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"killed after {kill_after} steps")
    assert losses(workdir, "plain") == losses(workdir, name)


def losses(workdir, name):
    lines = map(json.loads, log_lines(workdir, name))
    return [line["loss"] for line in lines if "loss" in line]


def validated(workdir, name):
    """What the validation after the last step has found."""
    line = json.loads(log_lines(workdir, name)[-1])
    assert line.pop("step") == STEPS
    assert line.pop("validation/seconds") > 0
    assert {"validation/nll", "validation/hr@3"} <= line.keys()
    return line


def test_two_processes_train_and_evaluate_like_one(workdir, evaluated):
    setting = f"debug,run=two,{VALIDATED}"
    first, second = start_two(workdir, "train", setting)
    wait_for_line(workdir, "two", 3)
    os.kill(second.pid, signal.SIGKILL)
    status = first.wait(60)
    output = first.printed("stderr")
    if status == -signal.SIGABRT:  # JAX missed the other's heartbeat before a step or save failed
        assert "This most likely indicates that another task died" in output
    else:
        assert status == 1
        assert "[process 0] train: " in output
        assert "start all of them again" in output or "could not be written" in output
    assert [process.wait(300) for process in start_two(workdir, "train", setting)] == [0, 0]
    np.testing.assert_allclose(losses(workdir, "plain"), losses(workdir, "two"), rtol=1e-6)
    validations = [validated(workdir, name) for name in ("aligned", "two")]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)

    shutil.rmtree(workdir / "evaluation")
    (workdir / "results.json").unlink()
    assert [process.wait(300) for process in start_two(workdir, "evaluate")] == [0, 0]
    assert json.loads((workdir / "results.json").read_text()) == evaluated


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
