import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf.checkpoint import load_model, save_model
from tca4rec_jax.cf.models.base import dropout
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.provenance import Provenance, StaleError

MADE_FROM = Provenance("CF model", "launch/train_cf.py", {"catalogue": "a" * 64})
CONFIG = SASRecConfig(num_items=12, history_length=5, units=8, blocks=2, heads=2, dropout=0.2)
HISTORIES = np.array([[PAD_ITEM, PAD_ITEM, 3, 0, 11], [1, 2, 3, 4, 5], [PAD_ITEM] * 5], np.int32)


def make_model(config=CONFIG, seed=0):
    return SASRec(config, rngs=nnx.Rngs(seed))


def layer_norm(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-8)
    return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def linear(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def reference_vector(model, items):
    """The published block in NumPy, for one history without padding, position by position."""
    config = model.config
    table = np.asarray(model.item_table[...], np.float64)
    positions = np.asarray(model.position_table[...], np.float64)[-len(items) :]
    x = table[items] * np.sqrt(config.units) + positions
    for block in model.blocks:
        query = layer_norm(x, block.attention_norm)
        q, k, v = linear(query, block.query), linear(x, block.key), linear(x, block.value)
        attended, width = np.zeros_like(x), config.units // config.heads
        for head in range(config.heads):
            columns = slice(head * width, (head + 1) * width)
            for place in range(len(items)):
                scores = k[: place + 1, columns] @ q[place, columns] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                attended[place, columns] = weights @ v[: place + 1, columns] / weights.sum()
        x = query + attended
        normed = layer_norm(x, block.feed_forward_norm)
        x = normed + linear(np.maximum(linear(normed, block.inner), 0), block.outer)
    return layer_norm(x, model.final_norm)[-1]


@pytest.mark.parametrize("row", [0, 1])
def test_user_vector_equals_the_published_block_and_ignores_padding(row):
    model = make_model()
    items = HISTORIES[row][HISTORIES[row] != PAD_ITEM]
    got = model.user_vectors(HISTORIES)[row]
    np.testing.assert_allclose(got, reference_vector(model, items), atol=1e-4)


def test_an_empty_history_has_a_finite_vector_of_its_own():
    vectors = np.asarray(make_model().user_vectors(HISTORIES))
    assert np.isfinite(vectors[2]).all()
    assert not np.allclose(vectors[2], vectors[1])


def test_hidden_is_causal():
    model = make_model()
    changed = HISTORIES.copy()
    changed[:, -1] = 7
    before, after = model.hidden(HISTORIES), model.hidden(changed)
    np.testing.assert_allclose(before[:2, :-1], after[:2, :-1], atol=1e-6)
    assert not np.allclose(before[:2, -1], after[:2, -1])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("norm", ["original", "pre", "post"])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_the_last_position_alone_is_that_of_all_of_them(blocks, norm, mask_padding):
    fields = {"blocks": blocks, "norm": norm, "mask_padding": mask_padding}
    model = make_model(dataclasses.replace(CONFIG, **fields))
    last = model.hidden(HISTORIES, last_only=True)
    assert last.shape == (3, 1, 8)
    np.testing.assert_allclose(last, model.hidden(HISTORIES)[:, -1:], atol=1e-5)


def test_dropout_keeps_the_mean_and_depends_on_its_key():
    x = np.ones((200, 200), np.float32)
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert abs((dropped == 0).mean() - 0.3) < 0.01
    assert abs(dropped.mean() - 1) < 0.01
    model = make_model()
    one, two = (model.hidden(HISTORIES, jax.random.key(seed)) for seed in (1, 2))
    assert not np.allclose(one, two)


@pytest.mark.parametrize(
    ("field", "value"), [("units", 0), ("heads", 3), ("dropout", 1.0), ("history_length", 0)]
)
def test_an_impossible_architecture_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_checkpoint_gives_the_same_vectors_back(tmp_path):
    model = make_model(seed=3)
    save_model(tmp_path / "sasrec.npz", "sasrec", model, MADE_FROM)
    name, restored = load_model(tmp_path / "sasrec.npz")
    assert name == "sasrec"
    assert restored.config == CONFIG
    np.testing.assert_array_equal(restored.user_vectors(HISTORIES), model.user_vectors(HISTORIES))


def test_a_model_of_another_catalogue_or_of_before_is_refused(tmp_path):
    path = tmp_path / "sasrec.npz"
    save_model(path, "sasrec", make_model(), MADE_FROM)
    load_model(path, {"catalogue": "a" * 64})
    with pytest.raises(StaleError, match=r"catalogue was a+, is b+\. .*with launch/train_cf\.py"):
        load_model(path, {"catalogue": "b" * 64})
    arrays = dict(np.load(path))
    fields = json.loads(str(arrays["config"]))
    del fields["made_from"]
    np.savez(path, **(arrays | {"config": json.dumps(fields)}))
    with pytest.raises(StaleError, match=r"does not say .*: run launch/train_cf\.py again"):
        load_model(path)


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "sasrec.npz"
    with pytest.raises(ValueError, match=r"sasrec\.npz: no such file"):
        load_model(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"sasrec\.npz: not a readable .*run launch/train_cf\.py"):
        load_model(path)
    save_model(path, "sasrec", make_model(), MADE_FROM)
    arrays = dict(np.load(path))
    np.savez(path, **(arrays | {"item_table": np.zeros((3, 8), np.float32)}))
    with pytest.raises(ValueError, match=r"item_table has shape \(3, 8\)"):
        load_model(path)
    arrays.pop("blocks.0.query.kernel")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"missing parameters .*blocks\.0\.query\.kernel"):
        load_model(path)
