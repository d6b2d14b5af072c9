"""Log-likelihood of given titles after a prompt, under the model that beam search ranks with.

A ranking of 400 rows is a coarse measure; how likely the model finds what came next is a fine one,
and costs a few tokens more to read behind the prompt.

Axis letters: R rows, B rows of a batch, L title tokens, K scored tokens, C children of a node,
T temperatures, V vocabulary, D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged


class TargetTitles(NamedTuple):
    """What is scored: NumPy on the host, a batch of it on the device (leading axis R or B).

    Attributes:
      place_RxK: int32, how many of the title's tokens each scored token comes after, 0 behind the
        last.
      token_RxK: int32, the scored tokens; -1 behind the last.
      node_RxK: int32, the trie node whose children a scored token is one of.
    """

    place_RxK: np.ndarray
    token_RxK: np.ndarray
    node_RxK: np.ndarray


def target_titles(trie: ItemTrie, leaf_R: np.ndarray) -> tuple[Ragged, TargetTitles]:
    """(what the LLM reads of each row's title behind the prompt, int32; what is scored).

    Scored are all tokens on a token-by-token trie, a title's decisions on a compressed one.
    """
    path_RxK = trie.paths_QxK[leaf_R]
    child_RxK = np.concatenate([path_RxK[:, 1:], np.full_like(path_RxK[:, :1], -1)], axis=1)
    node_RxK = np.where(child_RxK >= 0, path_RxK, 0)
    token_RxK = np.where(child_RxK >= 0, trie.token[child_RxK], -1)
    targets = TargetTitles(trie.depth[node_RxK], token_RxK, node_RxK)
    length_R = targets.place_RxK.max(axis=1)
    read_RxL = np.arange(trie.tokens_QxL.shape[1]) < length_R[:, None]
    return Ragged.from_lengths(trie.tokens_QxL[leaf_R][read_RxL], length_R), targets


def title_nll(
    model,
    states_BxKxD: jax.Array,
    target: TargetTitles,
    trie: DeviceTrie,
    temperature_T: jax.Array,
    *,
    masked_softmax: bool,
) -> jax.Array:
    """-log P(title | prompt) of each row's target at several temperatures; traceable.

    Args:
      model: a Decoder.
      states_BxKxD: its hidden states at the tokens before the scored ones.
      target: of the batch, [B, ...].
      trie: from `prepare_trie`.
      temperature_T: float32, each above 0.
      masked_softmax: the softmax over the node's children ('before_softmax') instead of over the
        vocabulary, which asks for targets of a token-by-token trie.

    Returns:
      float32 [B, T].
    """
    logits_BxKxV = model.logits(states_BxKxD)
    token_BxKx1 = jnp.maximum(target.token_RxK, 0)[:, :, None]
    chosen_BxK = jnp.take_along_axis(logits_BxKxV, token_BxKx1, axis=-1)[:, :, 0]
    allowed = logits_BxKxV
    if masked_softmax:
        child_BxKxC, valid_BxKxC = trie.children(target.node_RxK)
        token_BxKxC = trie.choice[trie.choice_index[child_BxKxC]]
        allowed = jnp.take_along_axis(logits_BxKxV, token_BxKxC, axis=-1)
        allowed = jnp.where(valid_BxKxC, allowed, -jnp.inf)

    def at(temperature):
        log_p_BxK = chosen_BxK / temperature - jax.nn.logsumexp(allowed / temperature, axis=-1)
        return -jnp.sum(jnp.where(target.token_RxK >= 0, log_p_BxK, 0.0), axis=1)

    return jax.lax.map(at, temperature_T).T
