"""What an experiment's LLM weights are known by."""

from tca4rec_jax.config import default_config
from tca4rec_jax.experiment import Experiment


def identity(weights, workdir):
    config = default_config()
    config.llm.weights = str(weights)
    return Experiment(config, workdir).weights_identity


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
    (folder / "model.safetensors").write_text("weights")
    assert list(identity(folder, tmp_path)) == ["model.safetensors"]


def test_a_pinned_download_is_known_by_its_name(tmp_path):
    assert identity("smollm2-135m-instruct", tmp_path) == "smollm2-135m-instruct"
