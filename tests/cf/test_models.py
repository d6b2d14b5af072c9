import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf.checkpoint import load_model, save_model
from tca4rec_jax.cf.models import item_item
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.bert4rec import BERT4Rec, BERT4RecConfig, _masked_positions
from tca4rec_jax.cf.models.bpr_mf import BPRMF, BPRMFConfig
from tca4rec_jax.cf.models.caser import Caser, CaserConfig
from tca4rec_jax.cf.models.gru4rec import GRU4Rec, GRU4RecConfig
from tca4rec_jax.cf.models.hstu import HSTU, HSTUConfig
from tca4rec_jax.cf.models.item_item import EASE, EASEConfig, ItemKNN, ItemKNNConfig
from tca4rec_jax.cf.models.lightgcn import LightGCN, LightGCNConfig
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.cf.scoring import host_items, user_vectors
from tca4rec_jax.cf.trainer import FitConfig, evaluate, fit
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.provenance import Provenance

NUM_ITEMS, NUM_USERS = 9, 12
SMALL = {"units": 8, "blocks": 1, "layers": 1, "heads": 2, "history_length": 4, "dropout": 0.0}


def rows_of(seed=0, num_rows=NUM_USERS, length=6):
    items = np.random.default_rng(seed).integers(0, NUM_ITEMS, num_rows * length)
    offsets = np.arange(num_rows + 1) * length
    return ItemSequences(np.arange(num_rows), items, offsets, np.full(items.size, -1))


def make(name, train, **changes):
    kind = MODELS[name]
    fields = {field.name for field in dataclasses.fields(kind.config)}
    values = {**SMALL, "num_users": len(train), **changes}
    config = kind.config(
        NUM_ITEMS, **{k: v for k, v in values.items() if k in fields - {"num_items"}}
    )
    if name == "popularity":
        config = kind.config(NUM_ITEMS)
    model = kind.module(config, rngs=nnx.Rngs(0))
    model.fit_statistics(train)
    return model


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_is_causal_and_survives_its_checkpoint(name, tmp_path):
    train = rows_of()
    model = make(name, train)
    changed_items = train.items.copy()
    position = 8  # row 1, place 2: it and what follows may change
    changed_items[position : train.offsets[2]] = (
        changed_items[position : train.offsets[2]] + 1
    ) % 9
    changed = ItemSequences(train.user, changed_items, train.offsets, train.timestamps)
    positions = np.array([6, 7, position, position + 1])
    before, after = (user_vectors(model, rows, positions)[:] for rows in (train, changed))
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.isfinite(before).all()
    if name != "popularity":
        assert not np.array_equal(before[3], after[3])
    table, bias = host_items(model)
    assert before.shape[1] == (NUM_ITEMS if table is None else table.shape[1])
    assert bias is None or bias.shape == (NUM_ITEMS,)
    made_from = Provenance("CF model", "launch/train_cf.py", {})
    save_model(tmp_path / "model.npz", name, model, made_from)
    loaded_name, loaded = load_model(tmp_path / "model.npz")
    assert loaded_name == name
    np.testing.assert_array_equal(user_vectors(loaded, train, positions)[:], before)
    some = user_vectors(model, train)[5:9]
    np.testing.assert_allclose(some, user_vectors(model, train)[:][5:9], atol=1e-6)


def cyclic_rows(seed, length=6, num_rows=60):
    starts = np.random.default_rng(seed).integers(0, NUM_ITEMS, num_rows)
    items = (starts[:, None] + np.arange(length)[None, :]) % NUM_ITEMS
    offsets = np.arange(num_rows + 1) * length
    return ItemSequences(np.arange(num_rows), items.ravel(), offsets, np.full(items.size, -1))


@pytest.mark.parametrize("name", ["gru4rec", "caser", "bert4rec", "hstu"])
def test_sequential_models_learn_the_successor(name):
    own = dataclasses.asdict(MODELS[name].training) | {"negatives": 2}
    train = cyclic_rows(0)
    model = make(name, train, history_length=3)
    config = FitConfig(**own, learning_rate=1e-2, batch_size=20, max_epochs=80, patience=80)
    assert evaluate(model, cyclic_rows(2))["ndcg@10"] < 0.65
    fitted = fit(model, train, cyclic_rows(1), config)
    assert evaluate(fitted.model, cyclic_rows(2))["ndcg@10"] > 0.8


@pytest.mark.parametrize("name", ["bpr_mf", "lightgcn"])
def test_models_of_users_learn_who_likes_what(name):
    rng = np.random.default_rng(0)  # even users like the first items, odd ones the last

    def rows(num_rows, length):
        items = [4 * (row % 2) + rng.permutation(4)[:length] for row in range(num_rows)]
        offsets = np.arange(num_rows + 1) * length
        return ItemSequences(
            np.arange(num_rows), np.concatenate(items), offsets, np.full(num_rows * length, -1)
        )

    train, unseen = rows(30, 3), rows(10, 4)
    model = make(name, train)
    config = FitConfig(
        **dataclasses.asdict(MODELS[name].training),
        learning_rate=3e-2,
        batch_size=30,
        max_epochs=30,
    )
    fitted = fit(model, train, unseen, config).model
    table, bias = host_items(fitted)
    logits = user_vectors(fitted, unseen, unseen.last_positions)[:] @ table.T
    logits = logits if bias is None else logits + bias
    best = np.argsort(-logits[:, :8], axis=1)[:, :4]
    assert ((best // 4) == (np.arange(10) % 2)[:, None]).mean() > 0.9


def test_gru_layer_against_numpy():
    model = GRU4Rec(GRU4RecConfig(NUM_ITEMS, 3, units=4), rngs=nnx.Rngs(0))
    history = np.array([[PAD_ITEM, 2, 5]])
    layer, state = model.layers[0], np.zeros(4)
    for item in (2, 5):
        x = np.asarray(layer.input(model.item_table[...][item][None]))[0]
        h = np.asarray(layer.recurrent(jnp.asarray(state, jnp.float32)[None]))[0]
        sigmoid = 1 / (1 + np.exp(-(x[:8] + h[:8])))
        reset, update = sigmoid[:4], sigmoid[4:]
        state = (1 - update) * np.tanh(x[8:] + reset * h[8:]) + update * state
    expected = np.asarray(model.output(jnp.asarray(state, jnp.float32)[None]))
    np.testing.assert_allclose(model.user_vectors(history), expected, atol=1e-5)


def test_hstu_against_loops():
    model = HSTU(HSTUConfig(NUM_ITEMS, 4, units=6, blocks=2, heads=2), rngs=nnx.Rngs(0))
    items, table = [2, 5, 2], np.asarray(model.item_table[...], np.float64)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    x = table[items] * np.sqrt(6) + np.asarray(model.position_table[...], np.float64)[-3:]
    for block in model.blocks:
        block.distance_bias[...] = 30 * block.distance_bias[...]  # so that it matters
        block.projection.kernel[...] = 20 * block.projection.kernel[...]
        bias = np.asarray(block.distance_bias[...])
        u, v, q, k = np.split(silu(norm(x) @ np.asarray(block.projection.kernel[...])), 4, -1)
        attended = np.zeros_like(x)
        for head in (slice(0, 3), slice(3, 6)):
            for place in range(3):
                for before in range(place + 1):
                    weight = silu(q[place, head] @ k[before, head] + bias[place - before])
                    attended[place, head] += weight * v[before, head] / 4
        gated = norm(attended) * u
        x = x + gated @ np.asarray(block.output.kernel[...]) + np.asarray(block.output.bias[...])
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) / 0.05
    got = model.hidden(np.array([[PAD_ITEM, *items]]))[0, 1:]
    np.testing.assert_allclose(got, expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(model.items()[0], axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("name", ["sasrec", "hstu", "gru4rec"])
def test_histories_of_any_width_have_the_same_vectors(name):
    model = make(name, rows_of(), history_length=9)
    assert model.any_width
    history = np.array([[PAD_ITEM, 2, 5], [PAD_ITEM, PAD_ITEM, PAD_ITEM], [1, 1, 7]], np.int32)
    wide = np.pad(history, ((0, 0), (6, 0)), constant_values=PAD_ITEM)
    np.testing.assert_allclose(model.hidden(history), model.hidden(wide)[:, -3:], atol=1e-5)
    last = model.user_vectors(history)
    np.testing.assert_allclose(last, model.hidden(history, last_only=True)[:, 0], atol=1e-5)


def test_caser_against_loops():
    config = CaserConfig(NUM_ITEMS, 3, units=4, horizontal=2, vertical=2)
    model = Caser(config, rngs=nnx.Rngs(0))
    image = np.concatenate([np.zeros((1, 4)), np.asarray(model.input_table[...])[[2, 5]]])
    found = []
    for height, layer in enumerate(model.horizontal, start=1):
        kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
        strips = [image[top : top + height].ravel() @ kernel + bias for top in range(4 - height)]
        found.append(np.maximum(strips, 0).max(axis=0))
    found.append((image.T @ np.asarray(model.vertical.kernel[...])).ravel())
    linear = np.concatenate(found) @ np.asarray(model.output.kernel[...])
    got = model.user_vectors(np.array([[PAD_ITEM, 2, 5]]))[0]
    np.testing.assert_allclose(got, np.maximum(linear, 0), atol=1e-6)


def test_bert4rec_never_sees_what_is_masked():
    model = BERT4Rec(BERT4RecConfig(NUM_ITEMS, 3, units=8, blocks=1), rngs=nnx.Rngs(0))
    items = np.array([[1, 2, 3, 4], [1, 2, 3, 7]])
    masked = np.array([[False, False, False, True]] * 2)
    hidden = np.asarray(model.hidden(items, masked))
    np.testing.assert_array_equal(hidden[0], hidden[1])
    expected = np.asarray(model._head(hidden[:1, -1]))
    np.testing.assert_allclose(model.user_vectors(items[:1, :3]), expected, atol=1e-6)


def test_masked_positions_are_real_or_the_last():
    items = jnp.asarray(np.tile([PAD_ITEM, PAD_ITEM, 3, 4, 5], (400, 1)))
    place, used = map(np.asarray, _masked_positions(items, jax.random.key(0), 0.6))
    assert place.shape == (400, 3)
    assert (place[used] >= 2).all()
    alone = used.sum(axis=1) == 1
    assert 0.4 < alone.mean() < 0.6
    assert (place[alone][used[alone]] == 4).all()
    place, used = map(np.asarray, _masked_positions(items, jax.random.key(0), 0.0))
    assert place.tolist() == [[4]] * 400
    assert used.all()


def binary_matrix(rows):
    x = np.zeros((len(rows), NUM_ITEMS))
    for row in range(len(rows)):
        x[row, rows[row]] = 1
    return x


def history_logits(weights, history):
    return sum(weights[item] for item in dict.fromkeys(history))


def test_ease_is_the_ridge_regression_of_each_item_on_the_others():
    rows = rows_of()
    model = EASE(EASEConfig(NUM_ITEMS, 4, regularisation=2.0), rngs=nnx.Rngs(0))
    model.fit_statistics(rows)
    x, weights = binary_matrix(rows), np.zeros((NUM_ITEMS, NUM_ITEMS))
    for item in range(NUM_ITEMS):
        others = [other for other in range(NUM_ITEMS) if other != item]
        gram = x[:, others].T @ x[:, others] + 2.0 * np.eye(NUM_ITEMS - 1)
        weights[others, item] = np.linalg.solve(gram, x[:, others].T @ x[:, item])
    got = model.user_vectors(np.array([[PAD_ITEM, 3, 3, 5], [PAD_ITEM] * 4]))
    np.testing.assert_allclose(got[0], history_logits(weights, [3, 5]), atol=1e-5)
    np.testing.assert_array_equal(got[1], 0)


def test_item_knn_keeps_the_nearest_neighbours():
    rows = rows_of()
    config = ItemKNNConfig(NUM_ITEMS, 4, neighbours=3, regularisation=1.0)
    model = ItemKNN(config, rngs=nnx.Rngs(0))
    model.fit_statistics(rows)
    x = binary_matrix(rows)
    for item in range(NUM_ITEMS):
        cosines = np.zeros(NUM_ITEMS)
        for other in set(range(NUM_ITEMS)) - {item}:
            norms = np.linalg.norm(x[:, item]) * np.linalg.norm(x[:, other])
            cosines[other] = x[:, item] @ x[:, other] / (norms + 1.0)
        cosines[cosines < np.sort(cosines)[-3]] = 0
        np.testing.assert_allclose(model.weights[...][:, item], cosines, atol=1e-6)


def test_item_item_models_take_their_items_in_blocks_and_say_what_memory_they_need(monkeypatch):
    rows = rows_of()
    for kind, config in ((EASE, EASEConfig), (ItemKNN, ItemKNNConfig)):
        whole, blocks = (kind(config(NUM_ITEMS, 4), rngs=nnx.Rngs(0)) for _ in range(2))
        whole.fit_statistics(rows)
        with monkeypatch.context() as patch:
            patch.setattr(item_item, "_ITEMS_AT_ONCE", 2)
            blocks.fit_statistics(rows)
        np.testing.assert_array_equal(whole.weights[...], blocks.weights[...])
        huge = kind(config(1_000_000, 4), rngs=nnx.Rngs(0))
        needed = f"{kind.__name__} of 1,000,000 items takes {kind.bytes_per_pair}000.0 GB"
        with pytest.raises(UserError, match=needed):
            huge.fit_statistics(rows)


def test_lightgcn_folds_a_history_in_as_a_new_node_of_the_graph():
    rows = rows_of()
    config = LightGCNConfig(NUM_ITEMS, 4, NUM_USERS, units=5, layers=2)
    model = LightGCN(config, rngs=nnx.Rngs(0))
    model.fit_statistics(rows)
    x = binary_matrix(rows)
    user_degree, item_degree = x.sum(1), np.maximum(x.sum(0), 1)
    adjacency = x / np.sqrt(user_degree[:, None] * item_degree[None, :])
    users, items = [np.asarray(model.user_table[...])], [np.asarray(model.item_table[...])]
    history = [2, 6, 8]
    new = [np.zeros(5)]
    for _ in range(2):
        new.append(sum(items[-1][i] / np.sqrt(3 * item_degree[i]) for i in history))
        users, items = [*users, adjacency @ items[-1]], [*items, adjacency.T @ users[-1]]
    np.testing.assert_allclose(model.items()[0], np.mean(items, axis=0), atol=1e-5)
    np.testing.assert_allclose(model.vectors()[0], np.mean(users, axis=0), atol=1e-5)
    got = model.user_vectors(np.array([[PAD_ITEM, *history]]))[0]
    np.testing.assert_allclose(got, np.mean(new, axis=0), atol=1e-5)


def test_bpr_mf_folds_in_by_the_best_multiple_of_the_mean():
    rows = rows_of()
    model = BPRMF(BPRMFConfig(NUM_ITEMS, 4, NUM_USERS, units=5), rngs=nnx.Rngs(0))
    model.fit_statistics(rows)
    table = np.asarray(model.item_table[...])
    means = np.stack([table[np.unique(rows[row])].mean(axis=0) for row in range(NUM_USERS)])
    users = np.asarray(model.user_table[...])
    factor = np.linalg.lstsq(means.reshape(-1, 1), users.ravel(), rcond=None)[0][0]
    got = model.user_vectors(np.array([[PAD_ITEM, 2, 6, 8]]))[0]
    np.testing.assert_allclose(got, factor * table[[2, 6, 8]].mean(axis=0), atol=1e-5)


def test_every_kind_has_what_the_protocol_says():
    for kind in MODELS.values():
        assert kind.module.user_vectors is not CFModel.user_vectors
        assert (kind.training is not None) == (kind.module.queries is not CFModel.queries)
        if kind.training is not None:
            assert FitConfig(**dataclasses.asdict(kind.training))
        assert "rngs" in inspect.signature(kind.module.__init__).parameters
