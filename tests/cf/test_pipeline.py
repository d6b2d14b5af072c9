import json
from pathlib import Path

import numpy as np
import pytest
import rich.console
from flax import nnx

from tca4rec_jax.cf import pipeline as run_module
from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.models.popularity import Popularity, PopularityConfig, popularity_logits
from tca4rec_jax.cf.models.sasrec import SASRecConfig
from tca4rec_jax.cf.pipeline import results_table, run_cf
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec
from tca4rec_jax.cf.scoring import profile, user_vectors
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.evaluation.report import write_cf_report

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


def test_a_model_without_an_item_table_is_stored_dense_or_cut_to_the_highest(tmp_path, data):
    config = {"model": "ease", "history_length": 4, "top_k": 5, "dtype": "bfloat16"}
    metrics = run_cf(
        config | {"logits": str(tmp_path / "elsewhere")}, data, tmp_path, history_length=4
    )
    assert metrics["training"] == {}
    rows = data.splits["test"]
    cut = open_store(tmp_path / "elsewhere" / "test", rows, data.catalogue)
    assert (cut.kind, cut.manifest["dtype"]) == ("topk", "bfloat16")
    assert not (tmp_path / "cf" / "logits").exists()
    _, model = load_model(tmp_path / "cf/checkpoint.npz")
    expected = user_vectors(model, rows, rows.last_positions)
    best = np.argsort(-expected, axis=1)[:, :5]
    got = cut.logits(rows.last_positions)
    np.testing.assert_allclose(
        np.take_along_axis(got, best, 1), np.take_along_axis(expected, best, 1), rtol=1e-2
    )


def test_filtering_seen_items_can_only_lift_the_target(tmp_path, data):
    kept, filtered = (
        run_cf(
            {"model": "item_knn", "history_length": 4, "filter_seen": seen},
            data,
            tmp_path / str(seen),
            history_length=4,
        )["results"]["ItemKNN"]["test"]["ndcg@10"]
        for seen in (False, True)
    )
    assert filtered > kept


def test_pytorch_weights_are_read_instead_of_training(tmp_path):
    titles = tuple(f"title {item}" for item in range(11))

    def rows(seed):
        return ItemSequences(
            np.arange(20),
            np.random.default_rng(seed).integers(0, 11, 120),
            np.arange(21) * 6,
            np.full(120, -1),
        )

    data = RecData(Catalogue(titles, titles), {split: rows(n) for n, split in enumerate(SPLITS)})
    checkpoint = Path(__file__).parents[1] / "goldens" / "pytorch_sasrec.pt"
    config = {"model": "sasrec", "units": 8, "history_length": 5, "weights": str(checkpoint)}
    metrics = run_cf(config, data, tmp_path, history_length=5)
    assert metrics["training"] == {"weights": str(checkpoint)}
    _, saved = load_model(tmp_path / "cf/checkpoint.npz")
    model = read_sasrec(checkpoint, SASRecConfig(11, 5, 8, 2, 1))
    test = data.splits["test"]
    np.testing.assert_array_equal(user_vectors(saved, test), user_vectors(model, test))
    with pytest.raises(ValueError, match="of cf.model 'sasrec' only"):
        run_cf(config | {"model": "gru4rec"}, data, tmp_path, history_length=5)


def test_profile_against_numpy(data):
    rows, counts = data.splits["test"], np.arange(12)
    model = Popularity(PopularityConfig(12), rngs=nnx.Rngs(0))
    model.fit_statistics(data.splits["train_sequences"])
    described = profile(model, rows, counts)
    logits = popularity_logits(data.splits["train_sequences"], 12)
    best, target = np.argsort(-logits, kind="stable")[:10], rows.items[rows.last_positions]
    assert described["coverage@10"] == pytest.approx(10 / 12)
    expected = counts[best].mean() / counts[target].mean()
    assert described["popularity@10"] == pytest.approx(expected)
    for beta in (0.5, 2.0):
        log_share = logits / beta - np.log(np.exp(logits / beta).sum())
        entropy = -(np.exp(log_share) * log_share).sum()
        assert described["entropy"][f"{beta:g}"] == pytest.approx(entropy, rel=1e-4)
        assert described["nll"][f"{beta:g}"] == pytest.approx(-log_share[target].mean(), rel=1e-4)
    assert described["nll"][f"{described['best_beta']:g}"] == min(described["nll"].values())


def test_the_report_has_tables_and_a_picture(tmp_path, data):
    metrics = run_cf({"model": "popularity"}, data, tmp_path, history_length=4)
    write_cf_report(tmp_path / "cf", metrics)
    text = (tmp_path / "cf" / "report.md").read_text()
    assert "| most popular, test, untied |" in text
    assert f"{metrics['results']['most popular']['test']['ndcg@20']:.4f}" in text
    assert (tmp_path / "cf" / "report.png").read_bytes().startswith(b"\x89PNG")


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
