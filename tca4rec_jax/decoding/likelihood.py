"""Log-likelihood of given titles after a prompt, under the model that beam search ranks with.

A ranking of 400 rows is a coarse measure; the probability of the title that came next is a fine
one, and costs a few more tokens to read. With the mask 'before_softmax' only decisions are scored,
over the children of their nodes; with 'after_softmax' all tokens of a title, over the vocabulary.

Axes: core/__init__.py; here F are title tokens, K scored tokens, T temperatures.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core import Array
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.search_sizes import states_at_once
from tca4rec_jax.llm.decoder import Decoder


class ScoredTokens(NamedTuple):
    """The tokens of titles that are scored, arrays [R, K]; padding has weight 0."""

    position: Array  # int32, how many of the title's tokens come before
    label: Array  # int32, the token, or which of the node's children it leads to
    weight: Array  # float32
    node: Array | None = None  # int32, of the compressed trie; None: over the vocabulary


def scored_titles(
    trie: ItemTrie, item_R: np.ndarray, config: SearchConfig
) -> tuple[Ragged, ScoredTokens]:
    """The titles of items of a token-by-token trie, prepared for `title_nll`.

    Returns (int32 tokens of each title that the LLM reads after the prompt, the scored tokens).
    """
    tokens_RxF = trie.tokens_QxL[trie.leaf_of_item[item_R]]
    if config.vocabulary:
        inside_RxF, column_F = tokens_RxF >= 0, np.arange(tokens_RxF.shape[1], dtype=np.int32)
        position_RxF, label_RxF = np.where(inside_RxF, column_F, 0), np.maximum(tokens_RxF, 0)
        scored = ScoredTokens(position_RxF, label_RxF, inside_RxF.astype(np.float32))
    else:
        made = title_decisions(trie.compress()).pad(item_R)
        scored = ScoredTokens(made.position, made.child, made.weight, made.node)
    length_R = np.max(scored.position, axis=1, initial=0)
    read_RxF = np.arange(tokens_RxF.shape[1]) < length_R[:, None]
    return Ragged.from_lengths(tokens_RxF[read_RxF], length_R), scored


def title_nll(
    model: Decoder,
    states_BxKxD: jax.Array,
    scored: ScoredTokens,
    trie: DeviceTrie,
    temperature_T: jax.Array,
) -> jax.Array:
    """float32 [B, T]: -log P(title | prompt) of each row's title; the sum of `token_log_probs`."""
    log_p_BxKxT = token_log_probs(model, states_BxKxD, scored, trie, temperature_T)
    return -jnp.sum(jnp.where(scored.weight[:, :, None] > 0, log_p_BxKxT, 0.0), axis=1)


def token_log_probs(
    model: Decoder,
    states_BxKxD: jax.Array,
    scored: ScoredTokens,
    trie: DeviceTrie,
    temperature_T: jax.Array,
) -> jax.Array:
    """float32 [B, K, T]: log P of each scored token at temperatures; traceable.

    The states are those at the tokens before the scored ones, `scored` the batch's part of
    `scored_titles`, the trie that of the search, the temperatures float32 above 0.
    """
    if scored.node is not None:
        logits_BxKxU = model.head(trie.choice)(states_BxKxD)
        child_BxKxC, is_child_BxKxC = trie.children(jnp.asarray(scored.node))
        index_BxKxC = trie.choice_index[child_BxKxC]
        logits_BxKxC = jnp.take_along_axis(logits_BxKxU, index_BxKxC, axis=-1)
        logits_BxKxC = jnp.where(is_child_BxKxC, logits_BxKxC, -jnp.inf)
        return _log_probs(logits_BxKxC, scored.label, temperature_T)
    head = model.head()

    def at_position(inputs):
        states_BxD, label_B = inputs
        return _log_probs(head(states_BxD), label_B, temperature_T)

    batch, scored_tokens, _ = states_BxKxD.shape
    vocabulary = jax.eval_shape(head, states_BxKxD).shape[-1]
    at_once = states_at_once(scored_tokens, batch * vocabulary)
    inputs = states_BxKxD.swapaxes(0, 1), scored.label.swapaxes(0, 1)
    return jax.lax.map(at_position, inputs, batch_size=at_once).swapaxes(0, 1)


def _log_probs(logits: jax.Array, label: Array, temperature_T: jax.Array) -> jax.Array:
    """log softmax(logits [..., V] / temperature) at the label [...] -> [..., T]."""
    chosen = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]

    def at(temperature):
        return chosen / temperature - jax.nn.logsumexp(logits / temperature, axis=-1)

    return jnp.moveaxis(jax.lax.map(at, temperature_T), 0, -1)
