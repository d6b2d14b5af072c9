"""What every contestant of train_step.py trains on: rows, batches, and random CF logits."""

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.item_tokens import ItemTokens, tokenise_items
from tca4rec_jax.data.published import read_published
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.lora import LoRAConfig
from tca4rec_jax.llm.tokenizer import load_tokenizer, text_encoder
from tca4rec_jax.training.batches import Batches
from tca4rec_jax.training.examples import build_examples
from tca4rec_jax.training.optimizer import OptimizerConfig

ALPHA, BETA, TAU, FORM = 0.1, 1.0, 4.5, "log_expectation"
LORA = LoRAConfig(rank=8, alpha=16.0, dropout=0.0, targets="(q|k|v|o)_proj")
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.01, clip=1.0)
TEMPLATE = PromptTemplate(("Products one person bought, in order:\n{history}\n{target}",))
MAX_TOKENS, BUCKETS = 512, tuple(range(64, 513, 16))


def random_weights(name: str):
    """An architecture by name and bfloat16 parameters of it, the same at every call."""
    import jax

    from tca4rec_jax.llm.architectures import architecture
    from tca4rec_jax.llm.decoder import init_params

    found = architecture(name)
    return found, init_params(found, jax.random.key(1), jax.numpy.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    contestant: str
    dtype: str
    data: str
    weights: str  # GGUF file or Hugging Face folder, of the tokenizer at least
    architecture: str  # of random weights; "": those of the file
    attention: str  # of ours, as is remat: DecoderOptions
    remat: str
    exported: str  # folder: base/ and adapters/ for PyTorch
    batch: int
    steps: int  # warm-up included


class RandomCF:
    """A factorised store of CF logits in memory: standard normal user vectors and item table."""

    item_bias = None

    def __init__(self, num_items: int, num_positions: int, width: int = 64):
        rng = np.random.default_rng(0)
        self.item_table = rng.standard_normal((num_items, width), np.float32)
        self._vectors = rng.standard_normal((num_positions, width), np.float32) / width**0.5

    def read(self, positions: np.ndarray) -> np.ndarray:
        return self._vectors[positions]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rows and their batches, the same in every process."""

    case: Case

    @cached_property
    def items(self) -> ItemTokens:
        encoder = text_encoder(load_tokenizer(Path(self.case.weights)), "known")
        return tokenise_items(self.data.catalogue.columns, encoder, TEMPLATE)

    @cached_property
    def data(self):
        return read_published(self.case.data, max_title_length=100)

    @cached_property
    def compressed(self) -> ItemTrie:
        return ItemTrie.build(self.items.written).compress()

    @cached_property
    def batches(self) -> Batches:
        split = self.data.splits["train"]
        examples = build_examples(
            split,
            self.items,
            title_decisions(self.compressed),
            targets="last",
            max_tokens=MAX_TOKENS,
        )
        store = RandomCF(self.data.catalogue.num_items, split.items.size)
        return Batches(examples, store, batch_size=self.case.batch, seed=0, buckets=BUCKETS)

    @cached_property
    def bucket(self) -> int:
        """That which most rows fall into: all steps have its rows."""
        return int(np.argmax(np.bincount(self.batches.bucket_of_example)))

    @property
    def columns(self) -> int:
        """Tokens that a row of the bucket is padded to."""
        return self.batches.shapes[self.bucket].tokens

    @cached_property
    def _shuffled(self) -> np.ndarray:
        inside = np.flatnonzero(self.batches.bucket_of_example == self.bucket)
        return np.random.default_rng(0).permutation(inside)

    def rows(self, step: int) -> np.ndarray:
        """Examples of a step, others in each."""
        return self._shuffled[step * self.case.batch :][: self.case.batch]

    def check_rows(self) -> None:
        """Raises UserError if there are too few rows for all steps."""
        needed, found = self.case.steps * self.case.batch, self._shuffled.size
        if found < needed:
            raise UserError(
                f"{self.case.steps} steps of {self.case.batch} rows are {needed}, but {found} rows"
                f" have about one length (up to {self.columns} tokens): fewer --steps or --batch"
            )
