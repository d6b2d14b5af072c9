"""Runs the LLM along the edges into the trie nodes that beam search has chosen.

Edges have different lengths, beams and users end at different times: a call of the LLM reads only
the tokens that are there to be read, packed into one of a few static sizes.

Axis letters: B batch (users), M beams, E tokens of an edge in one call, T tokens of one call,
U tokens that some node chooses from, D model, V vocabulary.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.llm.kv_cache import BeamCache, pack, pad_new_tokens, scatter_cache

_FEWEST_TOKENS = 40  # smaller calls are hardly faster: they wait for the weights
_USER_TOKENS = 2  # per beam of a user in one call, at most
_SIZES = (5 / 4, 3 / 4, 3 / 8, 1 / 8)  # tokens of a call per beam of the batch
_UNEVEN = 1.6  # times the mean of a call's tokens a user: what attention makes room for


class EdgeScores(NamedTuple):
    """What the LLM says after, and about, one edge per beam; logits are over the temperature.

    Attributes:
      choice_BxMxU: float32, logits of the tokens in DeviceTrie.choice after the edge.
      norm_BxM: float32, log sum exp over the vocabulary after the edge; 0 if not asked for.
      forced_BxM: float32, summed log-probabilities of the edge's tokens but the first; 0 if not
        asked for.
    """

    choice_BxMxU: jax.Array
    norm_BxM: jax.Array
    forced_BxM: jax.Array


def scores_of_hidden(model, hidden_BxMxD, trie, temperature, *, vocabulary: bool) -> EdgeScores:
    """The scores after the prompt, where there is no edge."""
    choice, norm, _ = _scores(model, hidden_BxMxD, trie, temperature, vocabulary)
    return EdgeScores(choice, norm, jnp.zeros(hidden_BxMxD.shape[:2]))


def run_edges(
    model,
    node_BxM: jax.Array,
    prompt: object,
    prompt_lengths_B: jax.Array,
    cache: BeamCache,
    trie: DeviceTrie,
    temperature: jax.Array,
    *,
    edge_chunk: int,
    vocabulary: bool,
) -> tuple[EdgeScores, BeamCache, jax.Array]:
    """Reads the edges into the given nodes (the root: none) after what has been read.

    Args:
      model: see beam_search.LanguageModel.
      edge_chunk: tokens of one edge that a call may read.
      vocabulary: whether norm and forced are wanted ('after_softmax').

    Returns:
      (scores, the new cache, int32 calls of the LLM).
    """
    batch, beams = node_BxM.shape
    length_BxM, offset_BxM = trie.run_length[node_BxM], trie.edge_offset[node_BxM]
    edge_length_BxM = trie.edge_length[node_BxM]
    sizes = call_sizes(batch, beams, edge_chunk)
    *smaller, (_, most_per_user) = sizes

    def call(size: int, per_user: int, carry):
        done_BxM, scores, cache = carry
        place_BxMxE = done_BxM[:, :, None] + jnp.arange(edge_chunk)[None, None, :]
        wanted_BxMxE = place_BxMxE < length_BxM[:, :, None]
        # More than fit are left for the next call: whole beams first, and edges from their start.
        rank_BxX = jnp.cumsum(wanted_BxMxE.reshape(batch, -1), axis=1)
        wanted_BxMxE &= rank_BxX.reshape(wanted_BxMxE.shape) <= per_user
        kept_T = jnp.nonzero(wanted_BxMxE.ravel(), size=size, fill_value=wanted_BxMxE.size)[0]
        index_BxMxE = (
            jnp.full(wanted_BxMxE.size, size).at[kept_T].set(jnp.arange(size), mode="drop")
        )
        index_BxMxE = index_BxMxE.reshape(wanted_BxMxE.shape)
        kept_BxMxE = index_BxMxE < size

        def token_at(place):
            return trie.edge_tokens.at[offset_BxM[:, :, None] + place].get(mode="clip")

        count_BxM = jnp.sum(kept_BxMxE, axis=2, dtype=jnp.int32)
        hidden_TxD, new = model.extend(
            token_at(place_BxMxE), count_BxM, prompt, prompt_lengths_B, cache, kept_T, per_user
        )
        next_T = pack(token_at(place_BxMxE + 1), kept_T)
        choice_TxU, norm_T, next_log_p_T = _scores(
            model, hidden_TxD, trie, temperature, vocabulary, next_T
        )
        is_forced_BxMxE = kept_BxMxE & (place_BxMxE + 1 < edge_length_BxM[:, :, None])
        forced_BxMxE = next_log_p_T.at[index_BxMxE].get(mode="clip")
        forced_BxM = jnp.sum(jnp.where(is_forced_BxMxE, forced_BxMxE, 0.0), axis=2)
        is_last_BxMxE = kept_BxMxE & (place_BxMxE == length_BxM[:, :, None] - 1)
        ends_BxM = jnp.any(is_last_BxMxE, axis=2)
        last_BxM = jnp.max(jnp.where(is_last_BxMxE, index_BxMxE, 0), axis=2)
        scores = EdgeScores(
            jnp.where(ends_BxM[:, :, None], choice_TxU[last_BxM], scores.choice_BxMxU),
            jnp.where(ends_BxM, norm_T[last_BxM], scores.norm_BxM),
            scores.forced_BxM + forced_BxM,
        )
        return done_BxM + count_BxM, scores, pad_new_tokens(new, most_per_user)

    def next_call(carry):
        count_BxM = jnp.minimum(length_BxM - carry[0], edge_chunk)
        count_B = jnp.minimum(jnp.sum(count_BxM, axis=1), most_per_user)
        fits = [(jnp.sum(count_B) <= size) & (jnp.max(count_B) <= most) for size, most in smaller]
        smallest = len(smaller) - sum(fits, jnp.int32(0))
        *carry, cache, calls = carry
        # Written outside: a branch that returned the pools would copy them.
        *carry, new = jax.lax.switch(
            smallest, [partial(call, *size) for size in sizes], (*carry, cache)
        )
        return *carry, scatter_cache(cache, new), calls + 1

    nothing_BxM = jnp.zeros((batch, beams))
    nothing = EdgeScores(jnp.zeros((batch, beams, trie.choice.shape[0])), nothing_BxM, nothing_BxM)
    _, scores, cache, calls = jax.lax.while_loop(
        lambda carry: jnp.any(carry[0] < length_BxM),
        next_call,
        (jnp.zeros_like(length_BxM), nothing, cache, jnp.int32(0)),
    )
    return scores, cache, calls


def call_sizes(batch: int, beams: int, edge_chunk: int) -> list[tuple[int, int]]:
    """(tokens, tokens of one user at most) of the calls that are compiled, ascending.

    The largest leaves what does not fit it to the next call; a smaller one is taken if all fits.
    """
    per_user = beams * min(edge_chunk, _USER_TOKENS)
    sizes = []
    for size in _SIZES:
        tokens = min(max(math.ceil(batch * beams * size), _FEWEST_TOKENS), batch * per_user)
        if not sizes or sizes[0] >= 1.5 * tokens:  # or it is not worth a program of its own
            sizes.insert(0, tokens)
    return [(tokens, min(math.ceil(_UNEVEN * tokens / batch), per_user)) for tokens in sizes]


def _scores(model, hidden_D, trie, temperature, vocabulary, next_token=None):
    """(choice logits [..., U], norm [...], log-probability of next_token [...])."""
    nothing = jnp.zeros(hidden_D.shape[:-1])
    if not vocabulary:
        return model.logits(hidden_D, trie.choice) / temperature, nothing, nothing
    logits_V = model.logits(hidden_D) / temperature
    norm = jax.nn.logsumexp(logits_V, axis=-1)
    next_log_p = nothing
    if next_token is not None:
        next_logit = jnp.take_along_axis(logits_V, next_token[..., None], axis=-1)[..., 0]
        next_log_p = jnp.minimum(next_logit - norm, 0.0)
    return jnp.take(logits_V, trie.choice, axis=-1), norm, next_log_p
