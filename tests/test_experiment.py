"""What an experiment's LLM weights are known by; what experiments share; what is kept."""

import dataclasses

import numpy as np
import pytest
from tiny_workdir import make_config, make_workdir

from tca4rec_jax import experiment_inputs
from tca4rec_jax.config import default_config
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.data.kept_arrays import kept_arrays
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.provenance import Provenance


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("work")
    make_workdir(path)
    return path


def identity(weights, workdir):
    config = default_config()
    config.llm.weights = str(weights)
    return Experiment(config, workdir).source.identity


def test_weights_are_known_by_their_content(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("weights")
    first = identity(file, tmp_path)
    file.write_text("weights")  # at another time
    assert identity(file, tmp_path) == first
    file.write_text("WEIGHTS")  # of the same size
    assert identity(file, tmp_path) != first

    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.write_text("weights")
    first = identity(folder, tmp_path)
    (folder / "README.md").write_text("about it")
    (folder / "tokenizer.json").write_text("{}")
    assert identity(folder, tmp_path) == first
    weights.rename(folder / "moved.safetensors")
    assert identity(folder, tmp_path) != first


def test_a_pinned_download_is_known_by_its_content_too(tmp_path):
    name = "smollm2-135m-instruct"
    assert identity(name, tmp_path) == file_sha256(fetch_file(name))


def test_experiments_share_what_they_have_read(workdir):
    first = Experiment(make_config(workdir, "first"), workdir)
    read = first.data, first.trie
    other = first.sharing(make_config(workdir, "other", dtype="bfloat16"))
    assert (other.data, other.trie) == read
    assert other.source is first.source
    assert "bfloat16" in str(other.inference_inputs)
    assert other.directory != first.directory


def test_tokens_and_trie_of_a_large_catalogue_are_kept(workdir, monkeypatch):
    config = make_config(workdir, "kept")
    plain = Experiment(config, workdir)
    plain.trie  # noqa: B018 - makes it
    assert not (workdir / "kept").exists()
    monkeypatch.setattr(experiment_inputs, "KEPT_FROM", 12)
    Experiment(config, workdir).trie  # noqa: B018 - makes and keeps it
    kept = sorted(path.name.partition("_")[0] for path in (workdir / "kept").iterdir())
    assert kept == ["items", "trie"]

    read = Experiment(config, workdir)
    written, catalogues = read.recipe.write_items, []
    recipe = dataclasses.replace(
        read.recipe, write_items=lambda *args: catalogues.append(args[0]) or written(*args)
    )
    monkeypatch.setattr(Experiment, "recipe", recipe)
    monkeypatch.setattr(ItemTrie, "build", None)  # nothing is made again
    for one in ("written", "shown", "before", "after"):
        np.testing.assert_array_equal(*(getattr(e.items, one).values for e in (read, plain)))
        np.testing.assert_array_equal(*(getattr(e.items, one).offsets for e in (read, plain)))
    assert [one.num_items for one in catalogues] == [1]
    assert not read.items.written.values.flags.owndata  # a file, mapped
    for field in dataclasses.fields(ItemTrie):
        np.testing.assert_array_equal(*(getattr(e.trie, field.name) for e in (read, plain)))


def test_kept_arrays_are_made_anew_if_damaged_or_of_something_else(tmp_path):
    calls = []

    def kept(inputs):
        def make():
            calls.append(inputs)
            return {"a": np.arange(inputs, inputs + 1000)}

        made_from = Provenance("arrays", "a test", {"inputs": inputs})
        return kept_arrays(tmp_path / "kept", "x", made_from, ["a"], make)["a"][0]

    assert [kept(1), kept(1), kept(2), kept(1)] == [1, 1, 2, 1]
    assert calls == [1, 2]
    for file in (tmp_path / "kept").glob("*/a.npy"):
        file.write_bytes(file.read_bytes()[:500])
    assert (kept(2), kept(2), calls) == (2, 2, [1, 2, 2])
    (tmp_path / "file").write_text("")
    made_from = Provenance("arrays", "a test", {})
    in_memory = kept_arrays(tmp_path / "file", "x", made_from, ["a"], lambda: {"a": np.ones(2)})
    assert in_memory["a"].sum() == 2  # nothing can be written there
