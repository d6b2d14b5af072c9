"""A decoder small enough to compile in a second."""

import pytest

from tca4rec_jax.config import default_config
from tca4rec_jax.llm import architectures
from tca4rec_jax.llm.config import DecoderConfig

TINY = DecoderConfig(512, 32, 64, 2, 4, 2, 8, max_positions=128)


@pytest.fixture
def tiny_config(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", TINY)
    config = default_config()
    config.llm.architecture = "tiny"
    config.training.targets = "last"
    config.training.buckets = (96,)
    config.training.batch_size = 4
    config.inference.batch_size = 4
    config.decoding.beams = 3
    return config
