"""Item embeddings against single texts without padding, after a kill, stale, and read."""

import shutil
import socket
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from forked import Script
from tiny_workdir import ITEMS, make_config, make_workdir

from tca4rec_jax import embedding
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.dataset import load, prepare
from tca4rec_jax.data.item_vectors import PARTS, VECTORS, read_item_vectors
from tca4rec_jax.decoding import embedder
from tca4rec_jax.embedding import embed_items, item_texts
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.lease import LeaseError, only_writer
from tca4rec_jax.llm.tokenizer import text_encoder
from tca4rec_jax.provenance import FILE, StaleError
from tca4rec_jax.status import Status
from tca4rec_jax.train import train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    make_workdir(path)
    titles = [f"{letter}{letter * item}" for item, letter in enumerate("abcdefghijkl")]
    pd.DataFrame({"item": range(ITEMS), "title": titles}).to_csv(path / "items.csv", index=False)
    shutil.rmtree(path / "data")
    config = make_config(path, "any")
    prepare(config.data, path / "data")
    run_cf(config.cf, load(path / "data"), path, history_length=4)
    return path


@pytest.fixture
def workdir(made, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_PART_ROWS", 5)  # 12 items: three parts
    return shutil.copytree(made, tmp_path / "copy")


def experiment_of(workdir, name="any", **fields):
    config = make_config(workdir, name)
    config.embedding.update({"text": "{title}b{title}", "batch_size": 4, "buckets": 2})
    config.embedding.update(fields)
    return Experiment(config, workdir)


def one_by_one(experiment, decoder, pool):
    """The embeddings of texts without padding, each alone."""
    config, catalogue = experiment.config, experiment.data.catalogue
    encoder = text_encoder(experiment.tokenizer, config.prompt.bos)
    vectors = []
    for title in catalogue.titles:
        tokens = np.array(encoder.inside(f"{title}b{title}"), np.int32)
        states_1xSxD = decoder.hidden(tokens[None], np.array([tokens.size], np.int32))
        vectors.append(pool(np.asarray(states_1xSxD[0])))
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_those_of_single_texts(workdir, pooling):
    experiment, programs = experiment_of(workdir, pooling=pooling), embedder._pooled._cache_size()
    found = read_item_vectors(embed_items(experiment), experiment.data.catalogue)
    pool = {"mean": lambda states: states.mean(axis=0), "last": lambda states: states[-1]}[pooling]
    expected = one_by_one(experiment, experiment.inference_decoder(""), pool)
    assert (found.dtype, found.shape) == (np.float32, (ITEMS, 64))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert embedder._pooled._cache_size() - programs == experiment.config.embedding.buckets
    assert {file.name for file in (workdir / "item_embeddings").iterdir()} == {VECTORS, FILE}


def test_prompts_with_ids_need_none_yet(workdir):
    experiment = experiment_of(workdir)
    path = embed_items(experiment)
    expected = path.read_bytes()
    shutil.rmtree(path.parent)
    experiment = experiment_of(workdir)
    experiment.config.prompt.item = "{id}"  # of ids that these embeddings are for
    assert embed_items(experiment).read_bytes() == expected


def test_a_text_may_have_attributes():
    catalogue = Catalogue(("7", "8"), ("Doll", "Kite"), {"brand": ("Ada", "")})
    texts = item_texts("{title} by {brand}", catalogue)
    assert texts == ["Doll by Ada", "Kite by "]


def test_the_token_that_begins_a_prompt_is_read_but_not_pooled():
    class Encoder:
        control = {"<s>": 7}

        @staticmethod
        def first(text):
            return [7, *map(ord, text)]

    texts = embedding.tokenise(["abc", "de"], Encoder, 3)
    assert [texts.tokens[row].tolist() for row in (0, 1)] == [[7, 97, 98], [7, 100, 101]]
    assert texts.begin_I.tolist() == [1, 1]
    with pytest.raises(UserError, match="item 1: the tokenizer makes no tokens of its text ''"):
        embedding.tokenise(["abc", ""], Encoder, 3)


def test_an_item_without_tokens_is_named_by_its_id(workdir, monkeypatch):
    monkeypatch.setattr(embedding, "item_texts", lambda *_: ["a", "", *"b" * (ITEMS - 2)])
    with pytest.raises(UserError, match="item '1': the tokenizer makes no tokens of its text ''"):
        embed_items(experiment_of(workdir))


def test_an_interrupted_call_goes_on_with_the_same_numbers(workdir, monkeypatch):
    experiment = experiment_of(workdir)
    path = embed_items(experiment)
    expected, folder = path.read_bytes(), path.parent
    shutil.rmtree(folder)
    write, ran, pooled = embedding._Parts.write, [], embedder._pooled

    def killed(parts, number, vectors):
        if number == 2:
            raise KeyboardInterrupt
        write(parts, number, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(embedding._Parts, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_items(experiment)
    assert not path.exists()
    assert len([*(folder / PARTS).iterdir()]) == 2
    row = Status(workdir).rows()["item_embeddings"]
    assert row["state"] == "interrupted"
    assert row["made anew with"] == "launch/embed_items.py"
    monkeypatch.setattr(embedder, "_pooled", lambda *args: ran.append(1) or pooled(*args))
    embed_items(experiment)
    assert len(ran) == 1  # the two items of the last part
    assert path.read_bytes() == expected
    monkeypatch.setattr("tca4rec_jax.llm.sources.load_weights", None)
    embed_items(experiment_of(workdir, batch_size=8))  # a complete one: nothing is loaded
    assert Status(workdir).rows()["item_embeddings"]["state"] == "up to date"


def test_those_of_a_run_are_of_its_llm(workdir, monkeypatch):
    pretrained = np.load(embed_items(experiment_of(workdir)))
    train(experiment_of(workdir, "trained"))
    experiment, warnings = experiment_of(workdir, "trained"), []
    with monkeypatch.context() as patch:  # the run is checked before the work and when it is read
        patch.setattr("tca4rec_jax.experiment.data_inputs", lambda *_: {"training rows": "others"})
        patch.setattr(
            "tca4rec_jax.experiment.logging.warning", lambda text, *_: warnings.append(text)
        )
        found = np.load(embed_items(experiment, "trained"))
    assert len([text for text in warnings if "it was trained, training rows was" in text]) == 1
    decoder = experiment.inference_decoder("trained")
    expected = one_by_one(experiment, decoder, lambda states: states.mean(axis=0))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - pretrained).max() > 1e-3
    with pytest.raises(FileNotFoundError, match="other"):
        embed_items(experiment, "other")


def test_other_inputs_replace_embeddings_but_not_a_users_file(workdir):
    path = embed_items(experiment_of(workdir))
    before = file_sha256(path)
    embed_items(experiment_of(workdir, text="{title}"))
    assert file_sha256(path) != before
    (path.parent / FILE).unlink()
    with pytest.raises(UserError, match="was not written by launch/embed_items.py: move it"):
        embed_items(experiment_of(workdir))
    with only_writer(path.parent), pytest.raises(LeaseError, match="being written"):
        embed_items(experiment_of(workdir))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "title"}, "embedding.text has 'title': expected a field, such as {title}"),
        ({"text": "{title} {year}"}, "{year}: the fields known there are {title}"),
        ({"text": "{title"}, "embedding.text has '{title': "),
        ({"batch_size": 3}, "embedding.batch_size is 3, but must be a multiple"),
    ],
)
def test_wrong_settings_are_refused_before_weights_are_read(workdir, monkeypatch, fields, message):
    monkeypatch.setattr("tca4rec_jax.llm.sources.load_weights", None)
    with pytest.raises(UserError) as error:
        embed_items(experiment_of(workdir, **fields))
    assert message in str(error.value)


def test_states_that_are_not_finite_name_the_item(workdir):
    experiment = experiment_of(workdir)
    architecture, params = experiment.pretrained
    token = text_encoder(experiment.tokenizer, "never").inside("l")[0]
    broken_VxD = params["embedding"].at[token].set(jnp.inf)
    experiment.__dict__["pretrained"] = architecture, params | {"embedding": broken_VxD}
    with pytest.raises(FloatingPointError, match="item '11': the LLM's hidden states"):
        embed_items(experiment)


def test_a_file_that_does_not_fit_is_refused(workdir, tmp_path):
    catalogue = experiment_of(workdir).data.catalogue
    path = tmp_path / "mine.npy"

    def message(array):
        np.save(path, array)
        with pytest.raises(UserError) as error:
            read_item_vectors(path, catalogue)
        return str(error.value)

    vectors = np.ones((ITEMS, 4), np.float16)
    np.save(path, vectors)
    assert read_item_vectors(path, catalogue).dtype == np.float32
    assert "has vectors of 11 items, the catalogue 12" in message(vectors[1:])
    assert "expected floating point [items, width]" in message(vectors[0])
    assert "int64" in message(np.ones((ITEMS, 4), np.int64))
    vectors[3, 1] = np.nan
    assert "the vector of item '3' (row 3) is not finite" in message(vectors)
    np.savez(tmp_path / "mine.npz", vectors)
    with pytest.raises(UserError, match=r"mine.npz is an .npz archive: expected one array of np.s"):
        read_item_vectors(tmp_path / "mine.npz", catalogue)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable .npy file"):
        read_item_vectors(path, catalogue)
    with pytest.raises(UserError, match="no such file of item vectors"):
        read_item_vectors(tmp_path / "none.npy", catalogue)


def test_embeddings_of_another_catalogue_are_stale(workdir):
    experiment = experiment_of(workdir)
    path = embed_items(experiment)
    text = (path.parent / FILE).read_text()
    hash_ = experiment.data.catalogue.content_hash()
    (path.parent / FILE).write_text(text.replace(hash_, "0" * 64))
    with pytest.raises(StaleError, match="catalogue was 000000000000, is"):
        read_item_vectors(path, experiment.data.catalogue)
    assert "stale" in Status(workdir).rows()["item_embeddings"]["state"]


CONFIG_FILE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from forked import Script
from tiny_workdir import make_config

def get_config(path):
    config = make_config(Path(path), "any")
    config.embedding.update(text="{{title}}b{{title}}", batch_size=4, buckets=2)
    return config
"""


def test_two_processes_write_what_one_writes(workdir, tmp_path):
    expected = np.load(embed_items(experiment_of(workdir)))
    shutil.rmtree(workdir / "item_embeddings")
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    with socket.socket() as one:
        one.bind(("localhost", 0))
        job = [f"--coordinator=localhost:{one.getsockname()[1]}", "--process_count=2"]
    command = [str(Path(__file__).parents[1] / "launch/embed_items.py"), f"--workdir={workdir}"]
    command += [f"--config={tmp_path / 'config.py'}:{workdir}", *job]
    both = [Script([*command, f"--process_index={index}"], {}, devices=2) for index in "01"]
    done = [script.completed(120) for script in both]
    errors = "\n".join(script.stderr for script in done)  # one's end is the other's error
    assert [script.returncode for script in done] == [0, 0], errors
    found = np.load(workdir / "item_embeddings" / VECTORS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
