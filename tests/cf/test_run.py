import json

import numpy as np
import pytest
import rich.console

from tca4rec_jax.cf import run as run_module
from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.run import results_table, run_cf
from tca4rec_jax.cf.scoring import user_vectors
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData

CONFIG = {
    "model": "sasrec",
    "units": 8,
    "blocks": 1,
    "history_length": 4,
    "batch_size": 8,
    "max_epochs": 1,
}


def random_rows(num_rows, length, seed):
    rng = np.random.default_rng(seed)
    items = rng.integers(0, 12, num_rows * length)
    times = np.sort(rng.integers(0, 9, (num_rows, length)), axis=1).ravel()
    return ItemSequences(np.arange(num_rows), items, np.arange(num_rows + 1) * length, times)


@pytest.fixture(scope="module")
def data():
    titles = tuple(f"title {item}" for item in range(12))
    splits = {split: random_rows(20, 6, seed) for seed, split in enumerate(SPLITS)}
    return RecData(Catalogue(titles, titles), splits)


def test_sasrec_run_writes_what_the_checkpoint_computes(tmp_path, data):
    metrics = run_cf(CONFIG, data, tmp_path, history_length=4)
    assert json.loads((tmp_path / "cf/metrics.json").read_text()) == metrics
    assert set(metrics["results"]) == {"most popular", "SASRec"}
    subsets = metrics["results"]["SASRec"]
    assert set(subsets) == {"validation", "test", "test, tied", "test, untied"}
    assert subsets["test, tied"]["rows"] + subsets["test, untied"]["rows"] == 20
    _, model = load_model(tmp_path / "cf/checkpoint.npz")
    for split, sequences in data.splits.items():
        store = open_store(tmp_path / "cf/logits" / split, sequences, data.catalogue)
        every = split == "train_sequences"
        positions = np.arange(len(sequences.items)) if every else sequences.last_positions
        expected = user_vectors(model, sequences, positions)
        np.testing.assert_allclose(store.read(positions), expected, atol=1e-5)
        np.testing.assert_array_equal(store.item_table, model.item_table[...])


def test_popularity_run_stores_its_bias(tmp_path, data):
    metrics = run_cf({"model": "popularity"}, data, tmp_path, history_length=4)
    assert list(metrics["results"]) == ["most popular"]
    rows = data.splits["test"]
    store = open_store(tmp_path / "cf/logits/test", rows, data.catalogue)
    logits = store.logits(rows.last_positions[:2])
    counts = np.bincount(data.splits["train_sequences"].items, minlength=12) + 1
    np.testing.assert_allclose(np.exp(logits), np.tile(counts / counts.sum(), (2, 1)), rtol=1e-5)


def test_a_complete_run_is_found_and_a_changed_one_is_made_again(tmp_path, data, monkeypatch):
    first = run_cf(CONFIG, data, tmp_path, history_length=4)
    fits = []
    train = run_module.trained_model
    monkeypatch.setattr(run_module, "trained_model", lambda *a: fits.append(a) or train(*a))
    assert run_cf(CONFIG, data, tmp_path, history_length=4) == first
    assert not fits
    run_cf(CONFIG | {"seed": 1}, data, tmp_path, history_length=4)
    assert len(fits) == 1
    (tmp_path / "cf/logits/test/manifest.json").unlink()
    run_cf(CONFIG | {"seed": 1}, data, tmp_path, history_length=4)
    assert len(fits) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "svd"}, "cf.model is 'svd'"),
        ({"unit": 8}, r"unknown fields \['unit'\]"),
        ({"history_length": 3}, "history is 4 items long, but the CF model reads 1 to 3"),
    ],
)
def test_bad_configs_stop_before_training(tmp_path, data, changes, message):
    with pytest.raises(ValueError, match=message):
        run_cf(CONFIG | changes, data, tmp_path, history_length=4)
    assert not (tmp_path / "cf").exists()


def test_the_table_fits_80_columns(tmp_path, data):
    metrics = run_cf({"model": "popularity"}, data, tmp_path, history_length=4)
    console = rich.console.Console(width=80, record=True)
    console.print(results_table(metrics))
    text = console.export_text()
    assert "test, untied" in text
    assert "…" not in text
