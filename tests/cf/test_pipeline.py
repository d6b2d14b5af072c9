import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf import pipeline
from tca4rec_jax.cf.checkpoint import load_model
from tca4rec_jax.cf.logits_format import LogitsStoreError
from tca4rec_jax.cf.logits_import import import_logits
from tca4rec_jax.cf.logits_store import check_one_model, multiply_out, open_store
from tca4rec_jax.cf.models.popularity import Popularity, PopularityConfig, popularity_logits
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.cf.models.sasrec import SASRecConfig
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec
from tca4rec_jax.cf.scoring import host_items, profile, user_vectors
from tca4rec_jax.cf.settings import CFSettings, store_inputs
from tca4rec_jax.cf.soft_labels import NEVER
from tca4rec_jax.config import default_config, movielens_config
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.evaluation.report import show_cf_results, write_cf_report
from tca4rec_jax.provenance import StaleError

CONFIG = {
    "model": "sasrec",
    "sasrec.units": 8,
    "sasrec.blocks": 1,
    "sasrec.loss": "softmax",
    "history_length": 4,
    "batch_size": 8,
    "max_epochs": 1,
}


def run_cf(fields, data, workdir, *, history_length):
    return pipeline.run_cf(cf_config(fields), data, workdir, history_length=history_length)


def cf_config(fields):
    config = default_config().lock()
    config.update_from_flattened_dict({f"cf.{name}": value for name, value in fields.items()})
    return config.cf


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
        expected = user_vectors(model, sequences, positions)[:]
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
    train = pipeline.trained_model
    monkeypatch.setattr(pipeline, "trained_model", lambda *a: fits.append(a) or train(*a))
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
    expected = user_vectors(model, rows, rows.last_positions)[:]
    best = np.argsort(-expected, axis=1)[:, :5]
    got = cut.logits(rows.last_positions)
    np.testing.assert_allclose(
        np.take_along_axis(got, best, 1), np.take_along_axis(expected, best, 1), rtol=1e-2
    )


@pytest.mark.parametrize("model", ["sasrec", "ease"])
def test_few_items_share_the_soft_labels(tmp_path, data, model):
    fields = CONFIG | {"model": model, "label_items": 4}
    run_cf(fields, data, tmp_path, history_length=4)
    _, trained = load_model(tmp_path / "cf/checkpoint.npz")
    table_IxD, bias_I = host_items(trained)
    for split, rows in data.splits.items():
        store = open_store(
            tmp_path / "cf/logits" / split,
            rows,
            data.catalogue,
            cf=store_inputs(cf_config(fields), tmp_path),
        )
        got_ExI = store.logits(store.positions)
        every_ExI = multiply_out(user_vectors(trained, rows, store.positions)[:], table_IxD, bias_I)
        for position, got_I, every_I in zip(store.positions, got_ExI, every_ExI, strict=True):
            kept = set(range(12))
            if split.startswith("train"):
                target = rows.items[position]
                history = rows.items[rows.offsets[rows.row_of(position)] : position]
                new = sorted(kept - {target, *history}, key=lambda item: -every_I[item])
                assert got_I[target] != NEVER
                kept = {item for item in kept if got_I[item] != NEVER} - {target}
                # of equal logits any
                np.testing.assert_allclose(
                    sorted(got_I[[*kept]]), sorted(every_I[new[: min(3, len(new))]]), atol=1e-5
                )
                kept |= {target}
            np.testing.assert_allclose(got_I[[*kept]], every_I[[*kept]], atol=1e-5)
    with pytest.raises(StaleError, match="cf.label_items was 4, is None"):
        open_store(
            tmp_path / "cf/logits/train",
            data.splits["train"],
            data.catalogue,
            cf=store_inputs(cf_config(CONFIG | {"model": model}), tmp_path),
        )


def test_filtering_seen_items_can_only_lift_the_target(tmp_path, data, capsys):
    kept, filtered = (
        run_cf(
            {"model": "item_knn", "history_length": 4, "filter_seen": seen},
            data,
            tmp_path / str(seen),
            history_length=4,
        )
        for seen in (False, True)
    )
    ndcg = [one["results"]["ItemKNN"]["test"]["ndcg@10"] for one in (kept, filtered)]
    assert ndcg[1] > ndcg[0]
    for one, without in ((kept, ""), (filtered, " but the row's history")):
        show_cf_results(one)
        assert f"ranking the whole catalogue{without}\n" in capsys.readouterr().out


def test_pytorch_weights_are_read_instead_of_training(tmp_path, caplog):
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
    config = {"sasrec.units": 8, "history_length": 5, "weights": str(checkpoint)}
    metrics = run_cf(config, data, tmp_path, history_length=5)
    assert metrics["training"] == {"weights": str(checkpoint)}
    popular, own = (one["validation"]["hr@10"] for one in metrics["results"].values())
    assert (own < popular) == ("CF: SASRec has an HR@10 of" in caplog.text)
    weak = {name: {"validation": {"hr@10": hr}} for name, hr in (("a", 0.2), ("b", 0.1))}
    pipeline._warn_of_a_weak_model(weak, "a", "b")
    assert "CF: b has an HR@10 of 0.1000 on the validation rows, 'a' has 0.2000" in caplog.text
    _, saved = load_model(tmp_path / "cf/checkpoint.npz")
    model = read_sasrec(checkpoint, SASRecConfig(11, 5, 8, 2, 1))
    test = data.splits["test"]
    np.testing.assert_array_equal(user_vectors(saved, test)[:], user_vectors(model, test)[:])
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
    assert described["relative popularity@10"] == pytest.approx(expected)
    for beta in (0.5, 2.0):
        log_share = logits / beta - np.log(np.exp(logits / beta).sum())
        entropy = -(np.exp(log_share) * log_share).sum()
        assert described["entropy"][f"{beta:g}"] == pytest.approx(entropy, rel=1e-4)
        assert described["nll"][f"{beta:g}"] == pytest.approx(-log_share[target].mean(), rel=1e-4)
    assert described["nll"][f"{described['best_beta']:g}"] == min(described["nll"].values())


@pytest.mark.usefixtures("drawn")
def test_the_report_has_tables_and_a_picture(tmp_path, data):
    metrics = run_cf({"model": "popularity"}, data, tmp_path, history_length=4)
    write_cf_report(tmp_path / "cf", metrics)
    text = (tmp_path / "cf" / "report.md").read_text()
    assert "| most popular, test, untied |" in text
    assert f"{metrics['results']['most popular']['test']['ndcg@20']:.4f}" in text
    profile = metrics["profiles"]["most popular"]
    for quantity, name in (("NLL", "nll"), ("entropy", "entropy")):
        values = " | ".join(f"{nats:.4f}" for nats in profile[name].values())
        assert f"| most popular, {quantity} | {values} |" in text
    assert (tmp_path / "cf" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "svd"}, "cf.model is 'svd'"),
        ({"sasrec.loss": "mse"}, "loss is 'mse'"),
        ({"sasrec.heads": 3}, "heads is 3: expected a divisor of its 8 units"),
        ({"history_length": 3}, "history is 4 items long, but the CF model reads 1 to 3"),
    ],
)
def test_bad_configs_stop_before_training(tmp_path, data, changes, message):
    with pytest.raises(ValueError, match=message):
        run_cf(CONFIG | changes, data, tmp_path, history_length=4)
    assert not (tmp_path / "cf").exists()


def test_an_unknown_field_is_an_error():
    with pytest.raises((AttributeError, KeyError), match="unit"):
        cf_config({"sasrec.unit": 8})


PAPERS = {
    "sasrec": {"blocks": 2, "heads": 1, "dropout": 0.5, "loss": "bce", "targets": "all"},
    "hstu": {"blocks": 2, "heads": 1, "dropout": 0.2, "temperature": 0.05, "loss": "softmax"},
    "gru4rec": {"layers": 1, "dropout": 0.3, "loss": "bpr", "negatives": 32},
    "caser": {"horizontal": 16, "vertical": 4, "dropout": 0.5, "targets": "window"},
    "bert4rec": {"blocks": 2, "heads": 2, "dropout": 0.1, "masked": 0.3, "loss": "softmax"},
    "lightgcn": {"layers": 3, "loss": "bpr", "negatives_outside": "user"},
    "bpr_mf": {"loss": "bpr", "negatives_outside": "user", "targets": "window"},
    "ease": {"regularisation": 250.0},
    "item_knn": {"neighbours": 100, "regularisation": 10.0},
    "popularity": {},
}


def values(settings):
    return {**vars(settings.architecture), **(vars(settings.training) if settings.training else {})}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_runs_as_its_paper_has_it_whatever_the_config_says_of_others(data, name):
    config = default_config() if name == "sasrec" else movielens_config()
    config.cf.model = name
    found = values(CFSettings.of(config.cf, data))
    assert PAPERS[name].items() <= found.items()
    assert found["num_items"] == 12
    assert found.get("num_users", 20) == 20


@pytest.mark.parametrize("name", list(MODELS))
def test_every_field_of_a_model_can_be_set(data, name):
    loss = "bpr" if name in ("bert4rec", "hstu") else "softmax"
    other = {"loss": loss, "targets": "last"}
    for field, paper in PAPERS[name].items():
        value = other.get(field, "window") if isinstance(paper, str) else type(paper)(paper * 2)
        value = min(value, 0.9) if field in ("dropout", "masked") else value
        changed = cf_config({"model": name, f"{name}.{field}": value})
        assert values(CFSettings.of(changed, data))[field] == value != paper


def test_a_field_of_another_model_leaves_the_run_as_it_is(tmp_path, data):
    first = run_cf({"model": "popularity"}, data, tmp_path, history_length=4)
    other = {"model": "popularity", "lightgcn.layers": 7}
    assert run_cf(other, data, tmp_path, history_length=4) == first


def test_the_table_fits_80_columns(tmp_path, data, capsys):
    show_cf_results(run_cf({"model": "popularity"}, data, tmp_path, history_length=4))
    text = capsys.readouterr().out
    assert "test, untied" in text
    assert max(map(len, text.splitlines())) <= 80


def test_more_labels_than_new_items_fit_a_store_of_float16(tmp_path, data):
    fields = CONFIG | {"model": "ease", "label_items": 12, "dtype": "float16"}
    run_cf(fields, data, tmp_path, history_length=4)
    rows = data.splits["train"]
    cf = store_inputs(cf_config(fields), tmp_path)
    store = open_store(tmp_path / "cf/logits/train", rows, data.catalogue, cf=cf)
    for position, got_I in zip(store.positions, store.logits(store.positions), strict=True):
        history = {*rows.items[rows.offsets[rows.row_of(position)] : position].tolist()}
        history -= {int(rows.items[position])}
        assert {*np.flatnonzero(got_I == NEVER).tolist()} == history


def test_imported_logits_are_never_replaced_by_training(tmp_path, data, monkeypatch):
    np.save(tmp_path / "mine.npy", np.zeros((20, 12), np.float32))
    path = tmp_path / "cf" / "logits" / "train"
    import_logits(tmp_path / "mine.npy", path, data.splits["train"], data.catalogue)
    monkeypatch.setattr(pipeline, "trained_model", lambda *a: pytest.fail("it trains"))
    message = r"logits/train was written by launch/import_cf_logits\.py .*--config\.cf\.logits="
    with pytest.raises(LogitsStoreError, match=message):
        run_cf({"model": "popularity"}, data, tmp_path, history_length=4)


def test_a_place_that_holds_something_else_is_refused_before_training(tmp_path, data, monkeypatch):
    (tmp_path / "home" / "train").mkdir(parents=True)
    (tmp_path / "home" / "train" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(pipeline, "trained_model", lambda *a: pytest.fail("it trains"))
    config = {"model": "popularity", "logits": str(tmp_path / "home")}
    with pytest.raises(LogitsStoreError, match=r"something other than CF logits \(thesis\.txt\)"):
        run_cf(config, data, tmp_path, history_length=4)


def test_stores_that_are_used_together_are_of_one_model(tmp_path, data):
    for seed in (0, 1):
        config = CONFIG | {"seed": seed, "logits": str(tmp_path / str(seed))}
        run_cf(config, data, tmp_path, history_length=4)
    stores = [tmp_path / "0" / "train", tmp_path / "0" / "test", tmp_path / "1" / "test"]
    check_one_model(*stores[:2])
    with pytest.raises(
        LogitsStoreError, match=r"1/test holds .* \(cf\.seed was 0, is 1\): .* of one"
    ):
        check_one_model(*stores)
    np.save(tmp_path / "mine.npy", np.zeros((20, 12), np.float32))
    import_logits(tmp_path / "mine.npy", stores[1], data.splits["test"], data.catalogue)
    with pytest.raises(LogitsStoreError, match="0/test holds the logits of 'imported', .*'SASRec'"):
        check_one_model(*stores[:2])


STORE_FIELDS = {
    "model": "gru4rec",
    "history_length": 5,
    "sasrec.units": 16,
    "sasrec.loss": "bce",
    "batch_size": 4,
    "max_epochs": 2,
    "seed": 1,
    "dtype": "bfloat16",
    "top_k": 3,
    "label_items": 3,
}


def test_a_store_of_other_cf_settings_is_stale_and_what_does_not_matter_is_not(tmp_path, data):
    run_cf(CONFIG, data, tmp_path, history_length=4)
    rows = data.splits["test"]

    def opened(changes):
        cf = store_inputs(cf_config(CONFIG | changes), tmp_path)
        open_store(tmp_path / "cf/logits/test", rows, data.catalogue, cf=cf)

    for harmless in ({}, {"filter_seen": True}, {"logits": "elsewhere"}, {"gru4rec.units": 16}):
        opened(harmless)
    for field, value in STORE_FIELDS.items():
        with pytest.raises(StaleError, match=rf"cf\.{field} was .*, is {value!r}"):
            opened({field: value})


def test_an_imported_store_is_compared_with_no_cf_settings(tmp_path, data):
    np.save(tmp_path / "mine.npy", np.zeros((20, 12), np.float32))
    rows = data.splits["test"]
    import_logits(tmp_path / "mine.npy", tmp_path / "s", rows, data.catalogue)
    open_store(tmp_path / "s", rows, data.catalogue, cf=store_inputs(cf_config(CONFIG), tmp_path))
