"""What an experiment's LLM weights are known by."""

import pytest
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.config import default_config
from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256


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
