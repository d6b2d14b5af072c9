import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf import trainer as fit_module
from tca4rec_jax.cf.losses import window_negatives
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig
from tca4rec_jax.cf.trainer import FitConfig, batch_loss_of, evaluate, fit
from tca4rec_jax.cf.windows import FlatRows
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences

NUM_ITEMS = 20


def cyclic_rows(num_rows, length, seed):
    """Every user walks through the catalogue in order, from a start of his own."""
    starts = np.random.default_rng(seed).integers(0, NUM_ITEMS, num_rows)
    items = (starts[:, None] + np.arange(length)[None, :]) % NUM_ITEMS
    offsets = np.arange(num_rows + 1) * length
    return ItemSequences(np.arange(num_rows), items.ravel(), offsets, np.full(items.size, -1))


def make_model(dropout=0.0, history_length=4):
    config = SASRecConfig(NUM_ITEMS, history_length, units=16, blocks=1, dropout=dropout)
    return SASRec(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("loss", "targets", "epochs", "least"),
    [
        ("softmax", "all", 40, 0.9),
        ("softmax", "window", 12, 0.9),
        ("bce", "all", 80, 0.7),
        ("sampled_softmax", "rows", 40, 0.9),
    ],
)
def test_learns_that_the_next_item_is_the_successor(loss, targets, epochs, least):
    model, validation = make_model(0.1), cyclic_rows(60, 5, seed=1)
    before = evaluate(model, validation)
    assert before["ndcg@10"] < 0.4
    config = FitConfig(
        loss=loss,
        negatives=32 if loss == "sampled_softmax" else 1,
        targets=targets,
        learning_rate=1e-2,
        batch_size=16,
        max_epochs=epochs,
        patience=80,
    )
    result = fit(model, cyclic_rows(80, 8, seed=0), validation, config)
    assert evaluate(result.model, validation)["ndcg@10"] > least
    assert result.epochs[-1]["loss"] < result.epochs[0]["loss"]
    assert evaluate(model, validation) == before  # the model passed in is not changed


def test_keeps_the_best_epoch_and_stops_after_patience():
    ndcg = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    seen = []

    def scripted(model, rows):
        seen.append(np.asarray(model.item_table[...]).copy())
        return {"ndcg@10": next(ndcg), "hr@10": 0.0, "nll": 0.0}

    rows, config = cyclic_rows(10, 6, seed=0), FitConfig(batch_size=4, patience=2)
    result = fit(make_model(), rows, rows, config, evaluate=scripted)
    assert result.best_epoch == 2
    assert len(result.epochs) == 4
    np.testing.assert_array_equal(result.model.item_table[...], seen[1])
    assert not np.array_equal(seen[1], seen[3])


def test_the_same_seed_gives_the_same_model():
    rows = cyclic_rows(20, 6, seed=0)
    tables = [
        np.asarray(
            fit(
                make_model(0.2), rows, rows, FitConfig(batch_size=8, max_epochs=2, seed=seed)
            ).model.item_table[...]
        )
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert not np.array_equal(tables[0], tables[2])


@pytest.mark.parametrize("targets", ["all", "window", "rows"])
def test_softmax_loss_is_the_mean_over_supervised_places(targets):
    model, rows = make_model(history_length=4), cyclic_rows(2, 6, seed=0)
    graph, params, constants = nnx.split(model, nnx.Param, ...)
    positions = np.array([1, 9], np.int32)  # two and four supervised places
    got = batch_loss_of(
        params,
        graph,
        constants,
        FitConfig(loss="softmax", targets=targets),
        fit_module._Rows(FlatRows.of(rows), None),
        4,
        positions,
        jax.random.key(0),
    )
    losses = []
    for position, start in zip(positions, (0, 6), strict=True):
        before = list(rows.items[start:position])
        history = np.array([([PAD_ITEM] * 4 + before)[-4:]], np.int32)
        logits = np.asarray(model.hidden(history)[0] @ model.item_table[...].T, np.float64)
        log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        count = 1 if targets == "window" else min(position - start + 1, 4)
        next_items = rows.items[position - count + 1 : position + 1]
        losses += list(-log_share[np.arange(4 - count, 4), next_items])
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-5)


def test_negatives_are_uniform_over_the_items_outside_the_window():
    seen_BxW = np.array([[3, 0, 3, 9], [PAD_ITEM, PAD_ITEM, 5, 5], [6, 7, 8, 9]], np.int32)
    drawn = np.asarray(window_negatives(jax.random.key(0), seen_BxW, 20000, 10))
    for row, seen in enumerate(seen_BxW):
        allowed = np.setdiff1d(np.arange(10), seen)
        share = np.bincount(drawn[row], minlength=10) / 20000
        np.testing.assert_allclose(share[allowed], 1 / len(allowed), atol=0.012)
        assert share[allowed].sum() == pytest.approx(1)


def test_a_loss_that_is_not_finite_stops_with_what_to_do():
    rows = cyclic_rows(10, 6, seed=0)
    with pytest.raises(FloatingPointError, match=r"epoch \d+; lower cf\.learning_rate"):
        fit(make_model(), rows, rows, FitConfig(learning_rate=1e38, batch_size=4, max_epochs=9))


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "mse"), ("targets", "first"), ("patience", 0), ("learning_rate", float("nan"))],
)
def test_bad_settings_are_errors_that_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        FitConfig(**{field: value})


def test_a_sampled_softmax_of_few_items_is_refused():
    rows = cyclic_rows(4, 6, seed=0)
    with pytest.raises(ValueError, match="negatives is 1: .*draws so many for all targets"):
        fit(make_model(), rows, rows, FitConfig(loss="sampled_softmax"))


def test_bce_needs_items_outside_the_window():
    rows = cyclic_rows(4, 6, seed=0)
    with pytest.raises(ValueError, match="negatives outside the window"):
        fit(make_model(history_length=19), rows, rows, FitConfig(loss="bce"))


@pytest.mark.parametrize("targets", ["all", "rows"])
def test_an_interrupted_training_goes_on_to_the_same_model(targets, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "_SAVE_SECONDS", -1.0)
    rows = cyclic_rows(20, 6, seed=0)
    config = FitConfig(targets=targets, batch_size=8, max_epochs=5, patience=9)
    whole = fit(make_model(0.2), rows, rows, config)
    evaluations = []

    def interrupted(model, rows):
        evaluations.append(evaluate(model, rows))
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return evaluations[-1]

    path = tmp_path / "training.npz"
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(0.2), rows, rows, config, checkpoint=path, evaluate=interrupted)
    resumed = fit(make_model(0.2), rows, rows, config, checkpoint=path)
    assert [record["epoch"] for record in resumed.epochs] == [1, 2, 3, 4, 5]
    assert [r["loss"] for r in resumed.epochs] == [r["loss"] for r in whole.epochs]
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(resumed.model)),
        jax.tree.leaves(nnx.state(whole.model)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    other = fit(make_model(0.2), rows, rows, FitConfig(max_epochs=1), checkpoint=path)
    assert len(other.epochs) == 1  # the state of another config is not gone on from


def test_targets_last_supervises_only_the_last_item_of_each_row():
    rows = cyclic_rows(7, 6, seed=0)
    config = FitConfig(targets="last", batch_size=7)
    [batches] = next(fit_module._epochs(rows, make_model(history_length=4), config))
    assert sorted(batches.position_TxB.ravel()) == rows.last_positions.tolist()


def rows_of_lengths(lengths, num_items=10):
    items = np.random.default_rng(0).integers(0, num_items, sum(lengths))
    offsets = np.cumsum([0, *lengths])
    return ItemSequences(np.arange(len(lengths)), items, offsets, np.full(items.size, -1))


def test_targets_rows_have_every_row_in_every_epoch_in_batches_of_like_widths():
    rows = rows_of_lengths([3] * 20 + [12] * 9 + [30] * 4)
    model, config = make_model(history_length=20), FitConfig(targets="rows", batch_size=10)
    epochs = fit_module._epochs_of_rows(rows, model, config)
    first, second = next(epochs), next(epochs)
    assert {batches.width for batches in first} == {8, 16, 20}
    for batches, number in zip(first, range(len(first)), strict=True):
        assert batches.number_T.tolist() == [number]
        [positions] = batches.position_TxB
        starts = rows.offsets[rows.row_of(positions)]
        targets = np.minimum(positions - starts + 1, 20)
        assert targets.max() <= batches.width
        assert 30 <= targets.sum() <= 100  # ten windows of the mean length have 65
    ends = [end for batches in first for end in batches.position_TxB.ravel()]
    assert set(ends) == {*rows.last_positions, *(rows.last_positions[-4:] - 20)}
    assert ends != [end for batches in second for end in batches.position_TxB.ravel()]


def test_a_narrow_window_gives_the_loss_of_a_wide_one():
    rows = rows_of_lengths([3, 5])
    graph, params, constants = nnx.split(make_model(history_length=20), nnx.Param, ...)
    data = fit_module._Rows(FlatRows.of(rows), None)
    config = FitConfig(loss="softmax", targets="rows")
    arguments = rows.last_positions.astype(np.int32), jax.random.key(0)
    narrow, wide = (
        jax.value_and_grad(batch_loss_of)(params, graph, constants, config, data, width, *arguments)
        for width in (5, 20)
    )
    for ours, theirs in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
