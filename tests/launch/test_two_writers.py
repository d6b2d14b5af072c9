"""Two processes that write to one place at once: one wins, the other says why, nothing is lost."""

import importlib
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from huggingface_hub import ModelCard
from tiny_workdir import ITEMS, make_config, make_workdir

from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.data.dataset import load
from tca4rec_jax.decoding.trie_logits_processor import Trie
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.lease import holder_of
from tca4rec_jax.llm.checkpoints.loading import load_weights
from tca4rec_jax.train import train

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIG = """
from tca4rec_jax.config import default_config


def get_config(arg=""):
    config = default_config()
    config.data.update({{"source": "files", "history_length": 4}})
    config.data.interactions, config.data.catalogue = "{0}/interactions.csv", "{0}/items.csv"
    config.cf.logits = "{0}/logits"
    return config
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("workdir")
    make_workdir(path)
    (path / "config.py").write_text(CONFIG.format(path))
    return path


def run_held(command, module, name, folder):
    """A script that waits for the file `go` where it calls a function of a module."""
    forked.keep_programs()
    target = importlib.import_module(module)
    function = getattr(target, name)

    def held(*args, **keywords):
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return function(*args, **keywords)

    setattr(target, name, held)
    forked.run(command, {}, 0, str(folder))


def one_wins(command, held_in, folder, place):
    """Starts a script, holds it while it writes, and starts it again."""
    first = forked.start(run_held, command, *held_in, folder)
    deadline = time.monotonic() + 120
    while not (folder / "held").exists():
        assert time.monotonic() < deadline
        assert first.is_alive()
        time.sleep(0.02)
    assert holder_of(place).process == first.pid
    second = forked.Script(command, {}).completed(120)
    assert second.returncode == 1
    assert f"{place} is being written by process {first.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
    (folder / "go").touch()
    first.join(120)
    assert first.exitcode == 0
    assert holder_of(place) is None


def test_of_two_imports_one_wins(workdir, tmp_path):
    data = load(workdir / "data")
    rows = data.splits["test"]
    np.save(tmp_path / "mine.npy", np.ones((len(rows), ITEMS), np.float32))
    command = [str(LAUNCH / "import_cf_logits.py"), f"--config={workdir}/config.py"]
    command += [f"--workdir={workdir}", "--split=test", f"--source={tmp_path}/mine.npy"]
    place = workdir / "logits" / "test"
    one_wins(command, ("tca4rec_jax.cf.logits_writer", "create_array"), tmp_path, place)
    logits = open_store(place, rows, data.catalogue).logits(rows.last_positions)
    np.testing.assert_array_equal(logits, 1.0)


def test_of_two_exports_one_wins(workdir, tmp_path):
    train(Experiment(make_config(workdir, "trained"), workdir))
    place = tmp_path / "exported"
    command = [str(LAUNCH / "export.py"), f"--workdir={workdir}", "--run=trained"]
    command += ["--format=merged", f"--output={place}"]
    one_wins(command, ("tca4rec_jax.llm.checkpoints.export", "export_decoder"), tmp_path, place)
    _, params = load_weights(place, np.float32)
    assert all(np.isfinite(value).all() for value in params.values())
    assert ModelCard.load(place / "README.md").data.library_name == "transformers"
    assert len(Trie(place).item_ids) == ITEMS
