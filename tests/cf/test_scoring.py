import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.cf import item_blocks, scoring
from tca4rec_jax.cf.item_blocks import LOGITS_AT_ONCE
from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.cf.models.sasrec import SASRec, SASRecConfig
from tca4rec_jax.cf.scoring import host_items, profile, score_rows, user_vectors
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.provenance import flatten

SEQUENCES = ItemSequences(
    np.arange(3),
    np.array([0, 1, 2, 3, 4, 5, 0, 1, 2]),
    np.array([0, 4, 6, 9]),
    np.full(9, -1),
)


@pytest.fixture(scope="module")
def model():
    config = SASRecConfig(num_items=6, history_length=3, units=8, blocks=1)
    return SASRec(config, rngs=nnx.Rngs(0))


def test_user_vectors_of_every_position_against_one_history_at_a_time(model):
    histories = []
    for row in range(len(SEQUENCES)):
        for place in range(len(SEQUENCES[row])):
            seen = SEQUENCES[row][:place][-3:]
            histories.append([PAD_ITEM] * (3 - len(seen)) + list(seen))
    expected = model.user_vectors(np.array(histories, np.int32))
    got = user_vectors(model, SEQUENCES, batch_size=4)[:]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_short_histories_are_padded_to_less_and_have_the_same_vectors():
    config = SASRecConfig(num_items=6, history_length=40, units=8, blocks=1)
    model = SASRec(config, rngs=nnx.Rngs(0))
    lengths = [45, 3, 20]
    items = np.random.default_rng(0).integers(0, 6, sum(lengths))
    rows = ItemSequences(np.arange(3), items, np.cumsum([0, *lengths]), np.full(items.size, -1))
    history, _ = rows.histories_and_targets(40)
    got = user_vectors(model, rows, rows.last_positions, batch_size=1)
    np.testing.assert_allclose(got[:], model.user_vectors(history), atol=1e-5)
    np.testing.assert_allclose(got[1:], model.user_vectors(history[1:]), atol=1e-5)


def test_user_vectors_of_chosen_positions(model):
    every = user_vectors(model, SEQUENCES)[:]
    chosen = np.array([8, 0, 8, 5])
    np.testing.assert_allclose(user_vectors(model, SEQUENCES, chosen)[:], every[chosen], atol=1e-5)
    assert user_vectors(model, SEQUENCES, np.zeros(0, np.int64))[:].shape == (0, 8)


def test_what_the_model_cannot_read_is_an_error(model):
    with pytest.raises(ValueError, match=r"positions must lie in 0\.\.8"):
        user_vectors(model, SEQUENCES, np.array([9]))
    other = ItemSequences(np.arange(2), np.array([0, 1, 6]), np.array([0, 1, 3]), np.full(3, -1))
    with pytest.raises(ValueError, match=r"row 1 holds item index 6.* knows 6 items"):
        user_vectors(model, other)


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, 12])
def test_score_rows_against_numpy(logits_at_once, monkeypatch):
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", logits_at_once)
    jax.clear_caches()  # 3 rows: all items, or blocks of 4
    rng = np.random.default_rng(0)
    vector_RxD, table_IxD = rng.normal(size=(7, 4)), rng.normal(size=(9, 4))
    bias_I, target_R = rng.normal(size=9), rng.integers(0, 9, 7)
    scores = score_rows(
        vector_RxD.astype(np.float32),
        CFItems(table_IxD.astype(np.float32), bias_I.astype(np.float32)),
        target_R,
        batch_size=3,
    )
    logits_RxI = vector_RxD @ table_IxD.T + bias_I[None, :]
    share_RxI = np.exp(logits_RxI) / np.exp(logits_RxI).sum(1, keepdims=True)
    own_R = np.take_along_axis(logits_RxI, target_R[:, None], 1)
    np.testing.assert_array_equal(scores.rank, (logits_RxI > own_R).sum(1))
    np.testing.assert_allclose(scores.nll, -np.log(share_RxI[np.arange(7), target_R]), rtol=1e-4)
    np.testing.assert_allclose(scores.entropy, -(share_RxI * np.log(share_RxI)).sum(1), rtol=1e-4)


def test_a_profile_in_blocks_is_that_of_whole_logits(model, monkeypatch):
    whole = profile(model, SEQUENCES, np.arange(6))
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", 12)
    jax.clear_caches()  # 3 rows: blocks of 4
    in_blocks = profile(model, SEQUENCES, np.arange(6))
    assert dict(flatten(in_blocks)) == pytest.approx(dict(flatten(whole)), rel=1e-5)
    logits = user_vectors(model, SEQUENCES, SEQUENCES.last_positions)[:] @ host_items(model)[0].T
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert whole["entropy"]["1"] == pytest.approx(-(share * np.log(share)).sum(1).mean(), rel=1e-5)


def test_a_profile_of_a_large_catalogue_is_of_some_rows(model, monkeypatch):
    first, last = (profile(model, SEQUENCES.take(np.array([row])), np.ones(6)) for row in (0, 2))
    monkeypatch.setattr(scoring, "_PROFILED", 12)  # logits: two rows of six items
    found = profile(model, SEQUENCES, np.ones(6))
    assert found["nll"]["1"] == pytest.approx((first["nll"]["1"] + last["nll"]["1"]) / 2)


def test_popularity_logits_are_smoothed_log_shares():
    logits_I = popularity_logits(SEQUENCES, 7)
    counts = np.array([2, 2, 2, 1, 1, 1, 0]) + 1
    assert logits_I.dtype == np.float32
    np.testing.assert_allclose(np.exp(logits_I), counts / counts.sum(), rtol=1e-6)
    with pytest.raises(ValueError, match="item index 5, but the CF model knows 5 items"):
        popularity_logits(SEQUENCES, 5)


@pytest.mark.parametrize("logits_at_once", [LOGITS_AT_ONCE, 4])
def test_seen_items_are_left_out_of_the_ranking_but_never_the_target(logits_at_once, monkeypatch):
    monkeypatch.setattr(item_blocks, "LOGITS_AT_ONCE", logits_at_once)
    jax.clear_caches()  # 2 rows: all items, or blocks of 2
    logits = np.array([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1]], np.float32)
    seen = np.array([[PAD_ITEM, 0, 1], [3, 0, 3]])
    target = np.array([2, 3])  # row 0 has seen two better ones; row 1 has had its target before
    kept = score_rows(logits, DENSE, target)
    filtered = score_rows(logits, DENSE, target, seen)
    assert kept.rank.tolist() == [2, 3]
    assert filtered.rank.tolist() == [0, 2]
    np.testing.assert_array_equal(filtered.nll, kept.nll)
