"""Cached hidden states: what they replace, and what a stopped run leaves."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.distributed.sharding import make_mesh
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params
from tca4rec_jax.llm.lora import LoRAConfig, init_adapters
from tca4rec_jax.provenance import FILE, Provenance, StaleError
from tca4rec_jax.training import activation_cache
from tca4rec_jax.training.activation_cache import ActivationCache

CONFIG = DecoderConfig(61, 32, 48, 3, 4, 2, 8, max_positions=64)
LORA = LoRAConfig(rank=2, dropout=0.5, first_layer=2)
TOKENS = Ragged.from_lengths(np.arange(40, dtype=np.int32) % 61, np.array([9, 12, 5, 11, 3]))
BATCHES = [(np.array([1, 3]), 2, 16), (np.array([0, 4]), 2, 16), (np.array([2]), 2, 8)]


@pytest.fixture(scope="module")
def decoder():
    adapters = init_adapters(CONFIG, LORA, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # a zero B would hide every mistake
    params = init_params(CONFIG, jax.random.key(0))
    return Decoder(CONFIG, params, lora=LORA, adapters=adapters)


@pytest.fixture
def states(decoder, tmp_path):
    made_from = Provenance("hidden states", "launch/train.py", {"layers": 2})
    return ActivationCache(tmp_path / "states", decoder, make_mesh(), made_from)


def contents(states):
    return {p.name: p.read_bytes() for p in states.directory.iterdir() if p.name != FILE}


def test_room_on_the_disk_is_asked_for_before_anything_runs(states, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    states.fill(TOKENS, BATCHES[:2])
    num_bytes = TOKENS.lengths[[0, 1, 3, 4]].sum() * CONFIG.hidden_size * 4
    assert f"hidden states of 4 rows take {num_bytes / 1e9:.2f} GB in" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 100))
    monkeypatch.setattr(activation_cache, "_run_prefix", None)
    with pytest.raises(UserError, match="of 1 rows take 0.00 GB: make room, or give --config.trai"):
        states.fill(TOKENS, BATCHES)
    states.fill(TOKENS, BATCHES[:2])  # all are there: nothing is asked


def test_loss_and_gradient_from_kept_states_are_those_of_the_whole_decoder(decoder, states):
    states.fill(TOKENS, BATCHES)
    rows = np.array([3, 4])
    lengths, keys = TOKENS.lengths[rows], jax.random.split(jax.random.key(3), 2)
    graph, adapters, base = nnx.split(decoder, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(adapters, frozen):
        def loss(adapters):
            hidden = nnx.merge(graph, adapters, base).hidden(
                TOKENS.pad(rows, 16, 0), lengths, frozen_BxSxD=frozen, dropout_key_B=keys
            )
            return (hidden**2).sum()

        return jax.value_and_grad(loss)(adapters)

    frozen = states.read(TOKENS, rows, 16)
    assert not frozen[0, 11:].any()
    assert not frozen[1, 3:].any()
    (value, found), (expected_value, expected) = (
        gradient(adapters, frozen),
        gradient(adapters, None),
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    loops = [str(jax.make_jaxpr(lambda x: gradient(adapters, x))(x)) for x in (None, frozen)]
    assert ["length=2" in loop for loop in loops] == [True, False], "the two lower layers"


def test_an_interrupted_call_goes_on_with_the_same_numbers(states, monkeypatch):
    states.fill(TOKENS, BATCHES)
    expected, (row, *_) = contents(states), BATCHES[1][0]
    assert len(expected) == 5
    path = states._path(TOKENS[row])
    path.write_bytes(path.read_bytes()[:-4])  # cut short
    with pytest.raises(ValueError, match=f"{path.name} has 287 numbers, expected 9 tokens x 32"):
        states.read(TOKENS, np.array([row]), 16)
    states._path(TOKENS[BATCHES[2][0][0]]).unlink()
    ran, run = [], activation_cache._run_prefix
    monkeypatch.setattr(
        activation_cache, "_run_prefix", lambda *args: ran.append(args[1].shape) or run(*args)
    )
    states.fill(TOKENS, BATCHES)
    assert ran == [(2, 16), (2, 8)]
    assert contents(states) == expected
    # Another epoch's batches of the same rows.
    states.fill(TOKENS, [(np.array([4, 1]), 2, 16), (np.array([2, 0]), 2, 16)])
    assert len(ran) == 2


def test_two_trainings_may_fill_one_folder(states, tmp_path, monkeypatch):
    alone = dataclasses.replace(states, directory=tmp_path / "alone")
    alone.fill(TOKENS, BATCHES)
    states.directory.mkdir()
    (states.directory / ".provenance.json.elsewhere.1.0.partial").touch()
    write, others = ActivationCache._write, [dataclasses.replace(states)]

    def meanwhile(*args):
        if others:
            others.pop().fill(TOKENS, BATCHES)
        write(*args)

    monkeypatch.setattr(ActivationCache, "_write", meanwhile)
    states.fill(TOKENS, BATCHES)
    assert contents(alone).items() <= contents(states).items()


def test_states_have_the_dtype_of_the_decoder(states, decoder):
    graph, state = nnx.split(decoder)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype("bfloat16"), state))
    states = dataclasses.replace(states, decoder=half)
    states.fill(TOKENS, BATCHES)
    assert states.read(TOKENS, np.array([0]), 16).dtype == "bfloat16"
    assert states._path(TOKENS[0]).stat().st_size == 9 * 32 * 2


def test_a_full_disk_is_named(states, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activation_cache.Path, "replace", no_room)
    with pytest.raises(
        OSError, match=r"make room, or give --config.training.cache_hidden_states=false"
    ):
        states.fill(TOKENS, BATCHES)


def test_a_folder_of_other_hidden_states_is_refused(states):
    states.fill(TOKENS, BATCHES)
    states.fill(TOKENS, BATCHES)
    other = dataclasses.replace(states, made_from=Provenance("hidden states", "x", {"layers": 3}))
    with pytest.raises(StaleError, match="layers was 2, is 3"):
        other.fill(TOKENS, BATCHES)
    (states.directory / FILE).unlink()
    with pytest.raises(StaleError, match="does not say what it was made from"):
        states.fill(TOKENS, BATCHES)
