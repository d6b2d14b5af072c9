"""What trackers are told: steps, validations, config, provenance, the table of an evaluation."""

import importlib.util
import json
import struct
import types

import numpy as np
import pytest
import tensorboardX
from tensorboardX.proto.event_pb2 import Event
from tiny_workdir import make_config, make_workdir, stopped_and_gone_on

from tca4rec_jax.config_checks import validate
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.trackers import Trackers, TrackingConfig

MADE_FROM = Provenance("LLM run", "x", {"seed": 1})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    make_workdir(path)
    return path


def shown(folder):
    """({tag: [(step, value)]}, {tag: text}) that TensorBoard shows.

    A SessionLog makes it forget the steps from its own on.
    """
    scalars, texts = {}, {}
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecord: length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                for values in scalars.values():
                    values[:] = [value for value in values if value[0] < event.step]
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts[value.tag] = value.tensor.string_val[0].decode()
                else:
                    point = event.step, np.float32(value.simple_value)
                    scalars.setdefault(value.tag, []).append(point)
    return scalars, texts


def test_tensorboard_has_what_the_log_has_also_of_a_run_that_went_on(workdir, monkeypatch):
    config = make_config(workdir, "run")
    config.validation.update(every=4, rows=4)
    run, _ = stopped_and_gone_on(config, workdir, monkeypatch)
    lines = read_json_lines(run.directory / "log.jsonl")
    scalars, texts = shown(run.directory / "tensorboard")
    for name in ("loss", "nll_per_title", "mfu", "validation/nll", "validation/ndcg@3"):
        expected = [(line["step"], np.float32(line[name])) for line in lines if name in line]
        assert scalars[name.replace("@", "_")] == expected  # a character that it does not take
    assert [step for step, _ in scalars["validation/nll"]] == [4, 5]
    assert json.loads(texts["config/text_summary"].strip("`json\n"))["run"] == "run"
    assert "training rows" in texts["provenance/text_summary"]

    config.evaluation.variants = (("LLM", "run", 0.0),)
    for _ in range(2):  # the second replaces the first
        results = evaluate_run(config, workdir)
    scalars, texts = shown(workdir / "tensorboard")
    hit_rate = results["models"]["LLM"]["by item"]["hr@3"].mean
    assert scalars["LLM.by_item.hr_3"] == [(0, np.float32(hit_rate))]
    assert texts["results/text_summary"] == (workdir / "results.md").read_text()
    assert len([*(workdir / "tensorboard").iterdir()]) == 1


def test_further_trackers_are_told_the_same(workdir, tmp_path, monkeypatch):
    """Stand-ins of the packages note what they are called with."""
    told = []

    def noted(kind):
        class Noting:
            def __getattr__(self, name):
                return lambda *args, **kwargs: told.append((kind, name, args, kwargs))

            summary = {}

        return Noting()

    run = noted("wandb")
    modules = {
        "wandb": types.SimpleNamespace(init=lambda **given: told.append(given) or run),
        "clu.metric_writers": types.SimpleNamespace(
            create_default_writer=lambda folder: told.append(folder) or noted("clu")
        ),
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    config = make_config(workdir, "run")
    config.tracking.update(also=("wandb", "clu"), project="mine")
    with Trackers.open(config, tmp_path, MADE_FROM, "identity") as trackers:
        trackers.scalars(3, {"loss": 0.5})
    assert told[0]["project"] == "mine"
    assert told[0]["id"].isalnum()
    assert told[0]["config"]["tracking"]["project"] == "mine"
    assert ("wandb", "log", ({"step": 3, "loss": 0.5},), {}) in told
    assert ("clu", "write_scalars", (3, {"loss": 0.5}), {}) in told
    assert [one[:2] for one in told[-2:]] == [("wandb", "finish"), ("clu", "close")]
    assert run.summary.keys() == {"config", "provenance"}


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(caplog):
    told = []

    class Failing:
        def scalars(self, step, values):
            raise RuntimeError("no network")

    def refused():
        raise OSError("no login")

    noting = types.SimpleNamespace(
        scalars=lambda step, values: told.append(step), close=lambda: told.append("closed")
    )
    openers = {"refused": refused, "failing": Failing, "noting": lambda: noting}
    with Trackers(openers) as trackers:
        for step in range(3):
            trackers.scalars(step, {"loss": 0.5})
    assert told == [0, 1, 2, "closed"]
    assert [record.args for record in caplog.records] == [
        ("refused", "OSError: no login"),
        ("failing", "RuntimeError: no network"),
    ]


def test_a_full_disk_ends_nothing_and_is_waited_for_by_nothing(workdir, monkeypatch, caplog):
    config, folder = make_config(workdir, "full"), workdir / "full"
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: full)
        with Trackers.open(config, folder, MADE_FROM, "identity") as trackers:
            for step in range(20):
                trackers.scalars(step, {"loss": 0.5})
    assert [record.args[0] for record in caplog.records] == ["TensorBoard"]


def test_a_tracker_that_is_not_installed_is_said_before_anything(workdir, monkeypatch):
    config = make_config(workdir, "run")
    config.tracking.also = ("wandb",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install '.\[wandb\]'"):
        validate(config)
    with pytest.raises(UserError, match="tracking.also is .*: expected one of 'wandb', 'clu'"):
        TrackingConfig(("mlflow",))
