"""What an LLM recommender is: five choices, as functions of a config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.cf.logits_store import CFLogits, LogitsStore
from tca4rec_jax.core.losses import Loss
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.engine import BatchedSearch
from tca4rec_jax.training.examples import Examples

if TYPE_CHECKING:
    from tca4rec_jax.experiment import Experiment


@dataclass(frozen=True)
class Recipe:
    """The five choices of an LLM recommender; all of its settings are in the config.

    Attributes:
      write_items: 1. How an item is written: (catalogue, tokenizer, config) -> the tokens of every
        item, no item's a prefix of another's; the trie is built of them.
      show_history: 2. How a history is shown: (item tokens, histories int32 [R, H] padded on the
        left with PAD_ITEM, config,
        candidates int32 [R, N] or None) -> the prompts.
      build_examples: 2. The same for training: (users' sequences, item tokens, training_trie,
        config) -> the examples, training.rows of them, with their targets and decisions.
      trainable: 3. What is trained: config -> the filter of nnx.split that picks the decoder's
        trained parameters.
      loss: 4. Which loss: (decoder, batch, CF items or None, trie, objective, dropout keys [B] or
        None, the projection) -> its sums over the batch. Traced.
      find_list: 5. How a list is found: (trie, config, mesh, beams) -> the search, for histories
        that `show_history` has shown.
      teacher: 4. What the CF model says: (experiment, split, the CF logits of the split) -> the
        logits of the trie's items in their place, an AnswerLogits where answers are evaluated.
      teacher_reads: the splits whose rows and CF logits the teacher reads besides.
      evaluated_by: 5. What launch/evaluate.py compares: the rankings of the targets, or answers.
    """

    write_items: Callable[[Catalogue, PreTrainedTokenizerBase, ConfigDict], ItemTokens]
    show_history: Callable[[ItemTokens, np.ndarray, ConfigDict, np.ndarray | None], Prompts]
    build_examples: Callable[[ItemSequences, ItemTokens, ItemTrie, ConfigDict], Examples]
    trainable: Callable[[ConfigDict], Any]
    loss: Callable[..., Loss]
    find_list: Callable[[ItemTrie, ConfigDict, jax.sharding.Mesh, int], BatchedSearch]
    teacher: Callable[["Experiment", str, LogitsStore], CFLogits]
    teacher_reads: tuple[str, ...] = ()
    evaluated_by: Literal["rankings", "answers"] = "rankings"
