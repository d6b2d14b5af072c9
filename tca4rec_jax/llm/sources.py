"""Where an LLM comes from: its architecture, tokenizer and weights, and what they are known by.

`StoredLLM` is a file or a folder, `RandomLLM` a decoder that is trained from scratch.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Sharding
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.data.downloads import ASSETS, content_hash, fetch_file
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.llm.checkpoints.hugging_face import CONFIG
from tca4rec_jax.llm.checkpoints.loading import load_weights, read_architecture
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import init_params
from tca4rec_jax.llm.from_scratch import FromScratch, id_tokenizer
from tca4rec_jax.llm.tokenizer import load_tokenizer

# How the names of a tokenizer's files begin in a Hugging Face folder.
_TOKENIZER = (
    *("tokenizer", "special_tokens", "added_tokens", "chat_template"),
    *("vocab", "merges", "spiece"),
)

# (architecture, path) -> where the parameter lives.
Places = Callable[[DecoderConfig, str], Sharding]


@dataclasses.dataclass(frozen=True)
class StoredLLM:
    """An LLM by config.llm.weights: a pinned download, a GGUF file or a Hugging Face folder."""

    weights: str

    @cached_property
    def path(self) -> Path:
        """The file or folder; a download is fetched."""
        return fetch_file(self.weights) if self.weights in ASSETS else Path(self.weights)

    @cached_property
    def architecture(self) -> DecoderConfig:
        """Raises UserError as `read_architecture`."""
        return read_architecture(self.path)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises UserError as `load_tokenizer`."""
        return load_tokenizer(self.path)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the file, or of the files of a folder that hold weights or shapes; a
        pinned download need not be there."""
        if self.weights in ASSETS:
            (digest,) = ASSETS[self.weights].files.values()
            return digest
        if not self.path.is_dir():
            return content_hash(self.path)
        return self._content(lambda file: file.suffix == ".safetensors" or file.name == CONFIG)

    @property
    def tokenizer_identity(self) -> str:
        """SHA-256 (hex) of a folder's tokenizer; '' if it is in the file of the weights."""
        if self.weights in ASSETS or not self.path.is_dir():
            return ""
        return self._content(lambda file: file.name.startswith(_TOKENIZER))

    def load(
        self, dtype: jnp.dtype, *, sharding: Places, quantised: str = "", num_layers: int = 0
    ) -> tuple[DecoderConfig, dict[str, jax.Array]]:
        """As `load_weights`."""
        logging.info("Loading the LLM's weights from %s", self.path)
        return load_weights(
            self.path, dtype, sharding=sharding, quantised=quantised, num_layers=num_layers
        )

    def _content(self, chosen: Callable[[Path], bool]) -> str:
        files = sorted(file for file in self.path.iterdir() if file.is_file() and chosen(file))
        return fingerprint({file.name: content_hash(file) for file in files})


@dataclasses.dataclass(frozen=True)
class RandomLLM:
    """A decoder that begins with random weights, drawn from a seed, and knows `tokens` alone."""

    settings: FromScratch
    tokens: tuple[str, ...]
    seed: int

    @cached_property
    def architecture(self) -> DecoderConfig:
        """Raises UserError as `FromScratch.architecture`."""
        return self.settings.architecture(len(self.tokenizer))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises UserError as `id_tokenizer`."""
        return id_tokenizer(self.tokens)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of what the weights are made of."""
        return fingerprint({"seed": self.seed, **dataclasses.asdict(self.architecture)})

    @property
    def tokenizer_identity(self) -> str:
        """SHA-256 (hex) of the tokens."""
        return fingerprint(self.tokens)

    def load(
        self, dtype: jnp.dtype, *, sharding: Places, quantised: str = "", num_layers: int = 0
    ) -> tuple[DecoderConfig, dict[str, jax.Array]]:
        """Config and parameters by path, made where they live; their values are the same on any
        mesh. Raises ValueError for quantised ones, which can't be trained."""
        if quantised:
            raise ValueError("random weights are not quantised")
        config = self.architecture.first_layers(num_layers or self.architecture.num_layers)
        places = {path: sharding(config, path) for path in config.parameter_shapes}
        make = jax.jit(partial(init_params, config, dtype=dtype), out_shardings=places)
        return config, make(jax.random.key(self.seed))
