"""What an experiment's LLM weights are known by."""

from tca4rec_jax.config import default_config
from tca4rec_jax.data.downloads import fetch_file
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import file_sha256


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
