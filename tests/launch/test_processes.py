"""Training and evaluation by their scripts, killed or of two processes: as if not.

With a tiny LLM (tests/tiny_workdir.py) whose lower layer is frozen and its hidden states kept.
"""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import Script
from tiny_workdir import make_workdir

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 6
VALIDATED = f"validation.every={STEPS},validation.rows=3"  # two rows and one of two processes
# Fusions as users have them: the old way rounds otherwise on two devices than on one of each.
FLAGS = os.environ["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=true"
CONFIG = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tca4rec_jax.config import apply_argument
from tiny_workdir import make_config

def get_config(arg=""):
    config = make_config(Path(__file__).parent, "plain")
    config.training.update(steps={STEPS}, cache_hidden_states=True)
    config.lora.first_layer = 1
    config.evaluation.rows = 8
    config.evaluation.variants = (
        ("aligned", "aligned", 0.0),
        ("guided", "aligned", 1.0),
    )
    return apply_argument(config, arg)
"""
pytestmark = pytest.mark.slow(30)


def start(script, workdir, setting="", *flags, devices=0):
    config = f"--config={workdir}/config.py:{setting}"
    command = [str(LAUNCH / f"{script}.py"), config, f"--workdir={workdir}", *flags]
    return Script(command, {"XLA_FLAGS": FLAGS}, devices)


def finish(*args):
    done = start(*args).completed()
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Prepared data, a CF model and one uninterrupted LLM run."""
    path = tmp_path_factory.mktemp("processes")
    make_workdir(path)
    (path / "config.py").write_text(CONFIG)
    finish("train", path, "run=plain")
    return path


@pytest.fixture(scope="module")
def evaluated(workdir):
    """What the evaluation in one process found."""
    finish("train", workdir, f"run=aligned,{VALIDATED}")
    finish("evaluate", workdir)
    return json.loads((workdir / "results.json").read_text())


def start_two(workdir, script, setting=""):
    """Two processes of a device each, as on two hosts."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{one.getsockname()[1]}"
    flags = (coordinator, "--process_count=2")
    return [
        start(script, workdir, setting, *flags, f"--process_index={index}", devices=1)
        for index in (0, 1)
    ]


def both_end_well(processes):
    for process in processes:
        assert process.wait(300) == 0, process.printed("stderr")[-3000:]


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
        process = start("train", workdir, f"run={name}")
        wait_for_line(workdir, name, steps)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before step {steps}"
    finish("train", workdir, f"run={name}")

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
    setting = f"run=two,{VALIDATED}"
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
    both_end_well(start_two(workdir, "train", setting))
    np.testing.assert_allclose(losses(workdir, "plain"), losses(workdir, "two"), rtol=1e-6)
    validations = [validated(workdir, name) for name in ("aligned", "two")]
    assert validations[0] == pytest.approx(validations[1], rel=1e-5)

    shutil.rmtree(workdir / "evaluation")
    (workdir / "results.json").unlink()
    both_end_well(start_two(workdir, "evaluate"))
    assert json.loads((workdir / "results.json").read_text()) == evaluated
