"""Item tables from vectors of the items: started from them, or frozen behind an adapter."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf import pipeline, trainer
from tca4rec_jax.cf.checkpoint import load_model, save_model
from tca4rec_jax.cf.item_tables import FrozenItems, freeze_tables, of_width, start_tables
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.cf.scoring import host_items, user_vectors
from tca4rec_jax.cf.settings import model_inputs, store_inputs
from tca4rec_jax.cf.trainer import FitConfig, fit
from tca4rec_jax.config import default_config
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.errors import UserError
from tca4rec_jax.provenance import Provenance, StaleError

NUM_ITEMS, WIDTH = 12, 20
TRAINED = [name for name, kind in MODELS.items() if kind.training]
SMALL = {"units": 8, "blocks": 1, "layers": 1, "heads": 2, "history_length": 4, "num_users": 20}
VECTORS = 5 + np.random.default_rng(3).normal(size=(NUM_ITEMS, WIDTH)).astype(
    np.float32
) * np.linspace(0.1, 2, WIDTH, dtype=np.float32)


def rows(seed):
    items = np.random.default_rng(seed).integers(0, NUM_ITEMS, 20 * 6)
    return ItemSequences(np.arange(20), items, np.arange(21) * 6, np.full(items.size, -1))


def fresh(name):
    kind = MODELS[name]
    fields = {field.name for field in dataclasses.fields(kind.config)}
    config = kind.config(NUM_ITEMS, **{k: v for k, v in SMALL.items() if k in fields})
    model = kind.module(config, rngs=nnx.Rngs(0))
    model.fit_statistics(rows(0))
    return model


def tables(model):
    return [np.asarray(getattr(model, name)[...]) for name in model.item_tables]


@pytest.mark.parametrize("name", TRAINED)
def test_a_started_table_has_the_vectors_and_the_models_spread(name):
    model = fresh(name)
    spreads = [table.std() for table in tables(model)]
    start_tables(model, VECTORS, "pca", seed=0)
    for table, spread in zip(tables(model), spreads, strict=True):
        np.testing.assert_allclose(table.std(), spread, rtol=1e-5)
        first = of_width(VECTORS, 8, "pca", 0)
        np.testing.assert_allclose(np.corrcoef(table.ravel(), first.ravel())[0, 1], 1, atol=1e-6)


def test_the_ways_to_the_models_width():
    centred = VECTORS - VECTORS.mean(axis=0)
    left, values, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    found = of_width(VECTORS, 8, "pca", 0)
    np.testing.assert_allclose(np.abs(found), np.abs(left * values)[:, :8], atol=1e-4)

    def dimensions(how, seed=0):
        found = of_width(VECTORS, 8, how, seed)
        return [int(np.flatnonzero(np.all(centred == c[:, None], axis=0))[0]) for c in found.T]

    by_variance = sorted(np.argsort(-centred.var(axis=0))[:8])
    assert dimensions("variance") == by_variance
    assert dimensions("uniform") == [0, 3, 5, 8, 11, 14, 16, 19]
    assert len({*dimensions("random")}) == 8
    assert dimensions("random") != dimensions("random", seed=1)
    with pytest.raises(UserError, match="have 20 dimensions, fewer than the 21 units"):
        of_width(VECTORS, 21, "variance", 0)


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
@pytest.mark.parametrize("name", TRAINED)
def test_frozen_vectors_stay_behind_an_adapter_that_is_trained(name, adapter, tmp_path):
    plain, model = fresh(name), fresh(name)
    freeze_tables(model, VECTORS, adapter, seed=0)
    for table, of_plain in zip(tables(model), tables(plain), strict=True):
        assert 0.5 < table.std() / of_plain.std() < 2  # a random adapter of few items
    graph, params, constants = nnx.split(model, nnx.Param, ...)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert (NUM_ITEMS, 8) not in shapes
    assert (WIDTH, 8) in shapes
    own = dataclasses.asdict(MODELS[name].training) | {"negatives": 2}
    config = FitConfig(**own, learning_rate=1e-2, batch_size=20, max_epochs=1)
    fitted = fit(model, rows(0), rows(1), config).model
    for one in model.item_tables:
        before, after = getattr(model, one), getattr(fitted, one)
        np.testing.assert_array_equal(before.vectors[...], after.vectors[...])
        assert np.abs(np.asarray(before[...] - after[...])).max() > 1e-3
    table, _ = host_items(fitted)
    assert table.shape == (NUM_ITEMS, 8)  # the store is of the model's width
    save_model(tmp_path / "m.npz", name, fitted, Provenance("CF model", "x", {}))
    loaded = load_model(tmp_path / "m.npz")[1]
    expected = user_vectors(fitted, rows(1), rows(1).last_positions)[:]
    found = user_vectors(loaded, rows(1), rows(1).last_positions)[:]
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_against_numpy():
    frozen = FrozenItems(jnp.asarray(VECTORS), 8, "mlp", 0.1, rngs=nnx.Rngs(0))
    (first, second), x = frozen.layers, VECTORS
    x = np.asarray(x @ np.asarray(first.kernel[...]))
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # biases are 0
    np.testing.assert_allclose(frozen[...], x @ np.asarray(second.kernel[...]), rtol=1e-4)


@pytest.fixture(scope="module")
def data():
    titles = tuple(f"title {item}" for item in range(NUM_ITEMS))
    splits = {split: rows(seed) for seed, split in enumerate(SPLITS)}
    return RecData(Catalogue(titles, titles), splits)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "item_embeddings").mkdir()
    np.save(tmp_path / "item_embeddings" / "embeddings.npy", VECTORS)
    return tmp_path


def cf_config(**fields):
    config = default_config()
    config.cf.sasrec.update(units=8, blocks=1, loss="softmax")
    config.cf.update(history_length=4, batch_size=8, max_epochs=3, **fields)
    return config.cf


def run(config, data, workdir):
    return pipeline.run_cf(config, data, workdir, history_length=4)


FIELDS = [{"item_init": "pca"}, {"item_init": "random"}, {"item_table": "frozen"}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_run_stores_what_its_model_computes(fields, data, workdir):
    metrics = run(cf_config(**fields), data, workdir)
    model = load_model(workdir / "cf" / "checkpoint.npz")[1]
    test = data.splits["test"]
    now = store_inputs(cf_config(**fields), workdir)
    store = open_store(workdir / "cf" / "logits" / "test", test, data.catalogue, cf=now)
    expected = user_vectors(model, test, test.last_positions)[:] @ host_items(model)[0].T
    np.testing.assert_allclose(store.logits(test.last_positions), expected, atol=1e-5)
    assert run(cf_config(**fields), data, workdir) == metrics  # found


def test_other_vectors_or_another_start_make_the_model_stale(data, workdir):
    config = cf_config(item_init="pca")
    run(config, data, workdir)
    path = workdir / "cf" / "checkpoint.npz"

    def check(config):
        load_model(path, {"cf": model_inputs(config, workdir)})

    check(config)
    for fields, message in [
        ({}, "cf.item_init was 'pca', is None"),
        ({"item_init": "variance"}, "cf.item_init was 'pca', is 'variance'"),
        ({"item_table": "frozen"}, "cf.item_adapter was None, is 'linear'"),
    ]:
        with pytest.raises(StaleError, match=re.escape(message)):
            check(cf_config(**fields))
    np.save(workdir / "mine.npy", VECTORS)
    check(cf_config(item_init="pca", item_vectors=str(workdir / "mine.npy")))
    np.save(workdir / "mine.npy", 2 * VECTORS)
    with pytest.raises(StaleError, match=r"cf\.item_vectors was \w{12}, is"):
        check(cf_config(item_init="pca", item_vectors=str(workdir / "mine.npy")))


def test_a_model_of_before_is_not_stale(data, workdir):
    run(cf_config(), data, workdir)
    _, model = load_model(workdir / "cf" / "checkpoint.npz")
    inputs = model_inputs(cf_config(), workdir)
    old = {"cf": {name: value for name, value in inputs.items() if not name.startswith("item_")}}
    save_model(workdir / "old.npz", "sasrec", model, Provenance("CF model", "x", old))
    load_model(workdir / "old.npz", {"cf": inputs})


def test_an_interrupted_training_goes_on_from_the_same_vectors_only(data, workdir, monkeypatch):
    config, saved = cf_config(item_table="frozen"), []
    expected = run(config, data, workdir)["training"]
    shutil.rmtree(workdir / "cf")
    monkeypatch.setattr(trainer, "_SAVE_SECONDS", 0.0)
    save = trainer._save

    def killed(path, state, identity, epochs):
        save(path, state, identity, epochs)
        saved.append(len(epochs))
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, data, workdir)
    saved.clear()
    found = run(config, data, workdir)["training"]
    assert saved == [3]
    for one, other in zip(found["epochs"], expected["epochs"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    shutil.rmtree(workdir / "cf")
    with pytest.raises(KeyboardInterrupt):
        run(config, data, workdir)
    saved.clear()
    np.save(workdir / "item_embeddings" / "embeddings.npy", -VECTORS)
    with pytest.raises(KeyboardInterrupt):  # after the second epoch again: it began anew
        run(config, data, workdir)
    assert saved == [1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"item_init": "pca", "item_table": "frozen"}, "item_init starts a trained item table"),
        ({"item_init": "pca", "model": "ease"}, "cf.model 'ease' has none"),
        ({"item_table": "frozen", "weights": "x.pth"}, "'sasrec' that is read from cf.weights has"),
        ({"item_init": "pca", "item_vectors": "none.npy"}, "none.npy: no such file of item vec"),
        ({"item_init": "pca", "item_vectors": "short.npy"}, "vectors of 11 items, the catalogue"),
        ({"item_init": "pca", "sasrec": {"units": 32}}, "have 20 dimensions, fewer than the 32"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message, data, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(pipeline, "fit", None)
    np.save("short.npy", VECTORS[1:])
    config = cf_config()
    config.update(fields)
    with pytest.raises(UserError, match=re.escape(message)):
        run(config, data, workdir)
