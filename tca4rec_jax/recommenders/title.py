"""The title recommender: an item is its title, a history the titles in their order.

Its settings: `prompt`, `llm.train`, `lora`, `objective`, `training.targets`, `decoding`. Most
published recommenders of titles are settings of it (docs/recommenders.md).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import CFItems, project
from tca4rec_jax.core.objective import Loss, Objective, tca_loss
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.prompts import PromptTemplate, TitleTokens, prompts, tokenise_titles
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.tokenizer import text_encoder
from tca4rec_jax.recommenders.recipe import Recipe
from tca4rec_jax.training import examples
from tca4rec_jax.training.state import TRAINED

if TYPE_CHECKING:
    from tca4rec_jax.training.batches import Batch


def write_items(
    catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase, config: ConfigDict
) -> TitleTokens:
    """Titles as text, between prompt.before_title and prompt.end."""
    template = build(PromptTemplate, config.prompt)
    return tokenise_titles(catalogue.titles, text_encoder(tokenizer, template.bos), template)


def show_history(items: TitleTokens, history_RxH: np.ndarray, config: ConfigDict) -> Ragged:
    """prompt.prefix and the latest titles that fit prompt.max_tokens."""
    return prompts(items, history_RxH, config.prompt.max_tokens)


def build_examples(
    sequences: ItemSequences, items: TitleTokens, compressed: ItemTrie, config: ConfigDict
) -> examples.Examples:
    """Every title of a sequence as a target, or the last one (training.targets)."""
    targets, max_tokens = config.training.targets, config.prompt.max_tokens
    return examples.build_examples(
        sequences, items, compressed, targets=targets, max_tokens=max_tokens
    )


def trainable(config: ConfigDict) -> Any:
    """The adapters, or every weight (llm.train), and the projector."""
    return TRAINED[config.llm.train]


def loss(
    decoder: Decoder,
    batch: "Batch",
    cf_items: CFItems | None,
    trie: DeviceTrie,
    objective: Objective,
    dropout_key_B: jax.Array | None = None,
    project: Callable[..., jax.Array] = project,
) -> Loss:
    """`tca_loss` of the decoder's hidden states; without cf_items plain next-token prediction."""
    hidden_BxSxD = decoder.hidden(
        batch.tokens_BxS,
        batch.length_B,
        soft=batch.soft,
        frozen_BxSxD=batch.frozen_BxSxD,
        dropout_key_B=dropout_key_B,
    )
    cf = batch.cf_BxPxD, cf_items
    return tca_loss(
        hidden_BxSxD, decoder.head, batch.targets, *cf, trie, objective, project=project
    )


def find_list(
    trie: ItemTrie, config: ConfigDict, mesh: jax.sharding.Mesh, beams: int
) -> BatchedSearch:
    """Beam search over the trie (decoding)."""
    searched = build(SearchConfig, config.decoding, beams=beams)
    batch_size, buckets = config.inference.batch_size, config.inference.buckets
    return BatchedSearch(trie, searched, mesh=mesh, batch_size=batch_size, buckets=buckets)


TITLE = Recipe(write_items, show_history, build_examples, trainable, loss, find_list)
