"""The generative recommender: it writes the next item, token by token.

Its settings: `prompt`, `llm.train`, `lora`, `objective`, `training.targets`, `decoding`. Most
published recommenders are settings of it (docs/recommenders.md).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.cf.logits_store import LogitsStore
from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import CFItems, project
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.losses import Loss, tca_loss
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import ItemTokens, tokenise_items
from tca4rec_jax.data.prompts import Prompts, prompts
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate, asks
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.tokenizer import in_chat, text_encoder
from tca4rec_jax.published_projection import project_rounded
from tca4rec_jax.recommenders.recipe import Recipe
from tca4rec_jax.training import examples
from tca4rec_jax.training.state import TRAINED

if TYPE_CHECKING:
    from tca4rec_jax.experiment import Experiment
    from tca4rec_jax.training.batches import Batch


def prompt_template(tokenizer: PreTrainedTokenizerBase, config: ConfigDict) -> PromptTemplate:
    """That of the config, in the chat template of the tokenizer if it says so."""
    template = build(PromptTemplate, config.prompt)
    return in_chat(template, tokenizer) if template.chat else template


def write_items(
    catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase, config: ConfigDict
) -> ItemTokens:
    """Titles, attributes and ids as the texts of prompt.item, prompt.target and training.tasks say.

    Raises UserError as `tokenise_items`, for tasks whose answers are no decisions of the trie, and
    for a template that asks about an item.
    """
    tasks = config.training.tasks
    if tasks and config.objective.softmax == "children":
        raise UserError(
            "training.tasks needs logits of the whole vocabulary: set objective.softmax=vocabulary"
        )
    template = prompt_template(tokenizer, config)
    if any(map(asks, template.templates)):
        raise UserError("prompt.templates has {item}: set recommender.name=answer, or leave it out")
    encoder = text_encoder(tokenizer, template.bos, template.bos_token)
    return tokenise_items(catalogue.columns, encoder, template, tasks)


def show_history(
    items: ItemTokens,
    history_RxH: np.ndarray,
    config: ConfigDict,
    candidates_RxN: np.ndarray | None = None,
) -> Prompts:
    """The first of prompt.templates around the latest items that fit prompt.max_tokens."""
    return prompts(items, history_RxH, config.prompt.max_tokens, candidates_RxN)


def build_examples(
    sequences: ItemSequences, items: ItemTokens, trie: ItemTrie, config: ConfigDict
) -> examples.Examples:
    """Every title of a sequence as a target, or the last one (training.targets); and the tasks."""
    return examples.build_examples(
        sequences,
        items,
        title_decisions(trie, build(Objective, config.objective).rounds),
        targets=config.training.targets,
        max_tokens=config.prompt.max_tokens,
        candidates=config.prompt.candidates or 0,
        unsupervised_end=config.training.unsupervised_end,
        rows=config.training.rows,
        seed=config.seed,
    )


def trainable(config: ConfigDict) -> Any:
    """The adapters, or every weight (llm.train), the projector and new rows of the vocabulary."""
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
    """`tca_loss` of the decoder's hidden states; without cf_items plain next-token prediction.

    `project` is that of the mesh; the published one takes its place if the objective rounds.
    """
    hidden_BxSxD = decoder.hidden(
        batch.tokens_BxS,
        batch.length_B,
        soft=batch.soft,
        frozen_BxSxD=batch.frozen_BxSxD,
        dropout_key_B=dropout_key_B,
    )
    args = batch.targets, batch.cf_BxPxD, cf_items, trie, objective
    projection = project_rounded if objective.rounds else project
    return tca_loss(hidden_BxSxD, decoder.head, *args, projection=projection)


def find_list(
    trie: ItemTrie, config: ConfigDict, mesh: jax.sharding.Mesh, beams: int
) -> BatchedSearch:
    """Beam search over the trie (decoding)."""
    searched = build(SearchConfig, config.decoding, beams=beams)
    batch_size, buckets = config.inference.batch_size, config.inference.buckets
    return BatchedSearch(trie, searched, mesh=mesh, batch_size=batch_size, buckets=buckets)


def teacher(experiment: "Experiment", split: str, store: LogitsStore) -> LogitsStore:
    """The logits themselves: what is generated are items."""
    return store


GENERATIVE = Recipe(write_items, show_history, build_examples, trainable, loss, find_list, teacher)
