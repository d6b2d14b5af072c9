"""Log-likelihood of given titles after a prompt, under the model that beam search ranks with.

A ranking of 400 rows is a coarse measure; how likely the model finds what came next is a fine one,
and costs one short call of the LLM once the prompt has run.

Axis letters: R rows, B rows of a batch, E title tokens, K scored tokens, C children of a
node, T temperatures, V vocabulary, D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.decoding.search_trie import SearchShape, SearchTrie
from tca4rec_jax.trie import ItemTrie


class TargetTitles(NamedTuple):
    """What is scored: NumPy on the host, a batch of it on the device (leading axis R or B).

    Attributes:
      tokens_RxE: int32, the title's tokens that the LLM reads, 0 behind its last.
      place_RxK: int32, how many of them each scored token comes after, 0 behind the last.
      token_RxK: int32, the scored tokens; -1 behind the last.
      node_RxK: int32, the trie node whose children a scored token is one of.
    """

    tokens_RxE: np.ndarray
    place_RxK: np.ndarray
    token_RxK: np.ndarray
    node_RxK: np.ndarray


def target_titles(trie: ItemTrie, leaf_R: np.ndarray) -> TargetTitles:
    """Each row's title: all its tokens on a token-by-token trie, its decisions on a compressed."""
    path_RxK = trie.paths_QxK[leaf_R]
    child_RxK = np.concatenate([path_RxK[:, 1:], np.full_like(path_RxK[:, :1], -1)], axis=1)
    node_RxK = np.where(child_RxK >= 0, path_RxK, 0)
    width = max(1, int(trie.depth[node_RxK].max(initial=0)))
    token_RxK = np.where(child_RxK >= 0, trie.token[child_RxK], -1)
    return TargetTitles(
        np.maximum(trie.tokens_QxL[leaf_R, :width], 0), trie.depth[node_RxK], token_RxK, node_RxK
    )


def title_nll(
    model,
    hidden_Bx1xD: jax.Array,
    prompt: object,
    prompt_lengths_B: jax.Array,
    target: TargetTitles,
    trie: SearchTrie,
    temperature_T: jax.Array,
    *,
    shape: SearchShape,
    masked_softmax: bool,
) -> jax.Array:
    """-log P(title | prompt) of each row's target at several temperatures; traceable.

    Args:
      model: a Decoder; hidden_Bx1xD, prompt: what `run_prompts` returned.
      target: of the batch, [B, ...].
      trie, shape: from `prepare_trie`.
      temperature_T: float32, each above 0.
      masked_softmax: the softmax over the node's children ('before_softmax') instead of over the
        vocabulary, which asks for targets of a token-by-token trie.

    Returns:
      float32 [B, T].
    """
    batch = target.tokens_RxE.shape[0]
    nothing_Bx1 = jnp.zeros((batch, 1), jnp.int32)  # no token is read for another call
    hidden_Bx1xExD, _ = model.extend(
        target.tokens_RxE[:, None, :],
        nothing_Bx1,
        prompt,
        prompt_lengths_B,
        model.empty_beams(batch, 1, 1),
    )
    # The state before title token t: the prompt's last for t = 0, then that of token t - 1.
    states_BxExD = jnp.concatenate([hidden_Bx1xD, hidden_Bx1xExD[:, 0]], axis=1)
    at_place_BxKxD = jnp.take_along_axis(states_BxExD, target.place_RxK[:, :, None], axis=1)
    logits_BxKxV = model.logits(at_place_BxKxD)
    token_BxKx1 = jnp.maximum(target.token_RxK, 0)[:, :, None]
    chosen_BxK = jnp.take_along_axis(logits_BxKxV, token_BxKx1, axis=-1)[:, :, 0]
    allowed = logits_BxKxV
    if masked_softmax:
        offset_C = jnp.arange(max(shape.root_children, shape.inner_children), dtype=jnp.int32)
        valid_BxKxC = offset_C[None, None, :] < trie.child_count[target.node_RxK][:, :, None]
        child_BxKxC = trie.child_start[target.node_RxK][:, :, None] + offset_C[None, None, :]
        child_BxKxC = jnp.where(valid_BxKxC, child_BxKxC, 0)
        token_BxKxC = trie.choice[trie.choice_index[child_BxKxC]]
        allowed = jnp.take_along_axis(logits_BxKxV, token_BxKxC, axis=-1)
        allowed = jnp.where(valid_BxKxC, allowed, -jnp.inf)

    def at(temperature):
        log_p_BxK = chosen_BxK / temperature - jax.nn.logsumexp(allowed / temperature, axis=-1)
        return -jnp.sum(jnp.where(target.token_RxK >= 0, log_p_BxK, 0.0), axis=1)

    return jax.lax.map(at, temperature_T).T
