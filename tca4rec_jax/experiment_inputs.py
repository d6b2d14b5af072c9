"""What an experiment reads: data, ids, the LLM's source, items as tokens, tries, CF logits.

Nothing here is on a device, and no weight is read.
"""

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.cf.logits_store import (
    LogitsStore,
    check_one_model,
    is_store,
    open_store,
    split_path,
)
from tca4rec_jax.cf.settings import store_inputs
from tca4rec_jax.config import build
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.dataset import load as load_data
from tca4rec_jax.data.item_tokens import ItemTokens, check_vocabulary
from tca4rec_jax.data.kept_arrays import kept_arrays
from tca4rec_jax.data.ragged import Ragged, ragged_arrays, raggeds
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.data.templates import ID
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.errors import UserError, items_named
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.from_scratch import RANDOM, FromScratch, check_known
from tca4rec_jax.llm.sources import RandomLLM, StoredLLM
from tca4rec_jax.llm.vocabulary import with_tokens
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.recommenders import Recipe, recipe_of
from tca4rec_jax.recommenders.ids import item_ids
from tca4rec_jax.semantic_ids.ids import SemanticIds
from tca4rec_jax.training.run_inputs import training_split

KEPT_FROM = 50_000
"""Items of a catalogue whose tokens and trie are kept in the work directory."""
_NOTHING = Ragged.of([])
_SHARED = ("data", "ids", "source", "tokenizer", "new_tokens", "items", "trie", "compressed_trie")


@dataclasses.dataclass(frozen=True, eq=False)
class ExperimentInputs:
    """The parts of an experiment that are read; each is made on first use."""

    config: ConfigDict
    workdir: Path

    def sharing(self, config: ConfigDict) -> Self:
        """Of another config with the same data, LLM and prompts: what is here is not read again."""
        other = type(self)(config, self.workdir)
        there = {name: self.__dict__[name] for name in _SHARED if name in self.__dict__}
        other.__dict__.update(there)  # as cached_property does
        return other

    @cached_property
    def data(self) -> RecData:
        """The prepared data set: splits and catalogue. Raises StaleError if config.data differs."""
        return load_data(self.workdir / "data", self.config.data)

    @cached_property
    def ids(self) -> SemanticIds | None:
        """The items' semantic ids, if prompts show them. Raises UserError as `item_ids`."""
        return item_ids(self)

    @cached_property
    def source(self) -> StoredLLM | RandomLLM:
        """The LLM before training. Raises UserError for a random one and prompts without ids."""
        llm = self.config.llm
        if llm.weights != RANDOM:
            return StoredLLM(llm.weights)
        if self.ids is None:
            raise UserError(
                f"llm.weights is {RANDOM!r}: such an LLM knows the tokens of ids alone; set "
                "prompt.item='{id}'"
            )
        return RandomLLM(build(FromScratch, llm.random), self.ids.tokens, self.config.seed)

    @property
    def stored_architecture(self) -> DecoderConfig:
        """The LLM's architecture with all of its layers; no weight is read."""
        return self.source.architecture

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The LLM's tokenizer, to which every token of `ids` is one token."""
        tokenizer = self.source.tokenizer
        return tokenizer if self.ids is None else with_tokens(tokenizer, self.ids.tokens)

    @cached_property
    def new_tokens(self) -> range:
        """The tokens of `ids` that the LLM lacks."""
        return range(len(self.source.tokenizer), len(self.tokenizer))

    @property
    def recipe(self) -> Recipe:
        """The recommender's five choices. Raises UserError for an unknown recommender.name."""
        return recipe_of(self.config.recommender.name)

    @cached_property
    def items(self) -> ItemTokens:
        """The catalogue's items as tokens.

        Raises UserError, before any weight is read, for tokens beyond the LLM's vocabulary, or
        texts that an LLM from scratch does not know.
        """
        catalogue = self.data.catalogue
        if self.ids is not None:
            columns = {**catalogue.attributes, ID: self.ids.texts}
            catalogue = dataclasses.replace(catalogue, attributes=columns)
        items = self._kept_items(catalogue)
        if isinstance(self.source, RandomLLM):
            check_known(items, self.tokenizer)
        vocab_size, new = self.stored_architecture.vocab_size, self.new_tokens
        vocab_size = max(vocab_size, new.stop) if new.start <= vocab_size else vocab_size
        check_vocabulary(items, catalogue.item_ids, vocab_size)
        return items

    def _kept_items(self, catalogue: Catalogue) -> ItemTokens:
        """What the recipe writes; of a large catalogue the items' own tokens are kept on disk."""

        def write(catalogue: Catalogue) -> ItemTokens:
            with items_named(catalogue.item_ids):
                return self.recipe.write_items(catalogue, self.tokenizer, self.config)

        if not self._keeps:
            return write(catalogue)
        made: dict[str, ItemTokens] = {}

        def make() -> dict[str, np.ndarray]:
            made["items"] = write(catalogue)
            return ragged_arrays(written=made["items"].written, shown=made["items"].shown)

        names = [
            f"{kind}_{part}" for kind in ("written", "shown") for part in ("values", "offsets")
        ]
        kept = kept_arrays(self._kept, "items", self._items_made_from, names, make)
        # All but the items is soon made: of one of them.
        rest = made["items"] if made else write(catalogue.take(np.arange(1)))
        tokens = raggeds(kept)
        return dataclasses.replace(rest, written=tokens["written"], shown=tokens["shown"])

    @property
    def _kept(self) -> Path:
        return self.workdir / "kept"

    @property
    def _keeps(self) -> bool:
        """Whether tokens and trie are kept: they take long, and are arrays of items alone."""
        config, many = self.config, self.data.catalogue.num_items >= KEPT_FROM
        return many and not config.training.tasks and config.prompt.tokenised == "pieces"

    @property
    def _items_made_from(self) -> Provenance:
        """What the tokens and the trie of a catalogue depend on."""
        inputs = {
            "format": 1,  # to be raised when a release makes other tokens of the same texts
            "catalogue": self.data.catalogue.content_hash(),
            "ids": fingerprint(self.ids.texts) if self.ids else "",
            "tokenizer": self.source.tokenizer_identity or self.source.identity,
            "prompt": self.config.prompt.to_dict(),
            "recommender": self.config.recommender.to_dict(),
        }
        return Provenance("kept catalogue", "any script that reads it", inputs)

    @property
    def objective(self) -> Objective:
        """What training optimises."""
        return build(Objective, self.config.objective)

    @cached_property
    def trie(self) -> ItemTrie:
        """The trie of the items' tokens, one token an edge."""

        def make() -> dict[str, np.ndarray]:
            with items_named(self.data.catalogue.item_ids):
                return vars(ItemTrie.build(self.items.written))

        if not self._keeps:
            return ItemTrie(**make())
        names = [field.name for field in dataclasses.fields(ItemTrie)]
        return ItemTrie(**kept_arrays(self._kept, "trie", self._items_made_from, names, make))

    @cached_property
    def compressed_trie(self) -> ItemTrie:
        """The trie without nodes of one child."""
        return self.trie.compress()

    @property
    def training_trie(self) -> ItemTrie:
        """The trie of the decisions that training supervises."""
        return self.trie if self.objective.rounds else self.compressed_trie

    @cached_property
    def item_filter(self) -> ItemFilter:
        """Which items may be recommended. Raises as ItemFilter.from_config."""
        found = ItemFilter.from_config(self.config.decoding, self.data)
        most = self.config.decoding.max_title_tokens
        return found if most is None else found.only(self.items.written.lengths <= most)

    def cf_store(self, split: str, positions: np.ndarray | None = None) -> LogitsStore:
        """The CF logits of a split, checked against it and config.cf.

        Only the shards of `positions` (flat, those that will be read) are read and checked. Raises
        as `open_store`, and LogitsStoreError if they are of another CF model than those, if any,
        that the config trains on.
        """
        of = partial(split_path, self.config.cf.logits, self.workdir)
        trained_on = of(training_split(self.config))
        if is_store(trained_on):
            check_one_model(trained_on, of(split))
        return open_store(
            of(split),
            self.data.splits[split],
            self.data.catalogue,
            positions=positions,
            cf=store_inputs(self.config.cf, self.workdir),
        )
