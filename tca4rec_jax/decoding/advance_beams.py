"""Reads the edges into the trie nodes that beam search has chosen, with the LLM.

Edges have different lengths, and users finish at different times. A call of the LLM therefore reads
only real tokens, packed into one of a few static sizes (`search_sizes.call_sizes`); edges that do
not fit are continued by the next call.

Axes: core/__init__.py; here E are new tokens of a beam in one call, Tp the tokens of a packed call,
X the B * M * E tokens before packing.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.decoding.search_sizes import call_sizes, states_at_once
from tca4rec_jax.llm import kv_cache
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import BeamCache, KVCache, NewTokens


class Prompts(NamedTuple):
    """Prompts that the LLM has read: a search goes on from them."""

    hidden_Bx1xD: jax.Array  # the state at each prompt's last token
    kv: KVCache  # [B, L, Kv, S, H]
    length_B: jax.Array  # int32


class EdgeScores(NamedTuple):
    """The LLM's float32 scores after one edge per beam, and of its tokens.

    Logits are divided by the temperature; without `vocabulary` norm and forced are 0.
    """

    choice_BxMxU: jax.Array  # logits of the tokens in DeviceTrie.choice after the edge
    norm_BxM: jax.Array  # log sum exp over the vocabulary after the edge
    forced_BxM: jax.Array  # summed log-probabilities of the edge's tokens but the first


@dataclass(frozen=True)
class EdgeReader:
    """Reads edges of a trie after prompts; lives inside a traced program."""

    model: Decoder
    prompts: Prompts
    trie: DeviceTrie
    temperature: float | jax.Array
    vocabulary: bool  # whether EdgeScores has norm and forced ('after_softmax')
    edge_chunk: int  # most tokens of one edge in a call

    def after_prompts(self) -> EdgeScores:
        """The scores [B, 1, ..] after the prompts, where there is no edge."""
        choice, norm, _ = self._scores(self.prompts.hidden_Bx1xD)
        return EdgeScores(choice, norm, jnp.zeros_like(norm))

    def advance(
        self, node_BxM: jax.Array, cache: BeamCache
    ) -> tuple[EdgeScores, BeamCache, jax.Array]:
        """Reads the edges into the given nodes (int32; the root has none) after the beams' paths.

        Returns (scores, the new cache, int32 calls of the LLM).
        """
        trie, (batch, beams) = self.trie, node_BxM.shape
        length_BxM = trie.run_length[node_BxM]
        *smaller, (_, most_per_user) = sizes = call_sizes(batch, beams, self.edge_chunk)

        def next_call(carry):
            read_BxM, scores, cache, calls = carry
            count_BxM = jnp.minimum(length_BxM - read_BxM, self.edge_chunk)
            count_B = jnp.minimum(jnp.sum(count_BxM, axis=1), most_per_user)
            fits = [(jnp.sum(count_B) <= n) & (jnp.max(count_B) <= most) for n, most in smaller]
            smallest = len(smaller) - sum(fits, jnp.int32(0))
            branches = [partial(self._call, node_BxM, *size, most_per_user) for size in sizes]
            # The cache is written outside: a branch that returned the pools would copy them.
            read_BxM, scores, new = jax.lax.switch(smallest, branches, read_BxM, scores, cache)
            return read_BxM, scores, kv_cache.scatter_cache(cache, new), calls + 1

        zeros_BxM = jnp.zeros((batch, beams))
        scores = EdgeScores(jnp.zeros((batch, beams, trie.choice.shape[0])), zeros_BxM, zeros_BxM)
        _, scores, cache, calls = jax.lax.while_loop(
            lambda carry: jnp.any(carry[0] < length_BxM),
            next_call,
            (jnp.zeros_like(length_BxM), scores, cache, jnp.int32(0)),
        )
        return scores, cache, calls

    def _call(
        self,
        node_BxM: jax.Array,
        size: int,
        per_user: int,
        padded: int,
        read_BxM: jax.Array,
        scores: EdgeScores,
        cache: BeamCache,
    ) -> tuple[jax.Array, EdgeScores, NewTokens]:
        """One call of `size` tokens, after the first `read` of each edge.

        Returns (read, scores, the new tokens padded to `padded` for each user).
        """
        trie, shape = self.trie, (*node_BxM.shape, self.edge_chunk)
        length_BxM = trie.run_length[node_BxM]
        column_BxMxE = read_BxM[:, :, None] + jnp.arange(self.edge_chunk)[None, None, :]
        wanted_BxMxE = column_BxMxE < length_BxM[:, :, None]
        # Tokens that do not fit wait for the next call: whole beams first, edges from their start.
        rank_BxME = jnp.cumsum(wanted_BxMxE.reshape(shape[0], -1), axis=1)
        wanted_BxMxE &= rank_BxME.reshape(shape) <= per_user
        filler = wanted_BxMxE.size
        kept_Tp = jnp.nonzero(wanted_BxMxE.ravel(), size=size, fill_value=filler)[0]
        index_X = jnp.full(filler, size).at[kept_Tp].set(jnp.arange(size), mode="drop")
        index_BxMxE = index_X.reshape(shape)
        kept_BxMxE = index_BxMxE < size
        count_BxM = jnp.sum(kept_BxMxE, axis=2, dtype=jnp.int32)

        def token_at(column_BxMxE):
            offset_BxMxE = trie.edge_offset[node_BxM][:, :, None] + column_BxMxE
            return trie.edge_tokens.at[offset_BxMxE].get(mode="clip")

        _, kv, length_B = self.prompts
        hidden_TpxD, new = self.model.extend(
            token_at(column_BxMxE), count_BxM, kv, length_B, cache, kept_Tp, per_user
        )
        next_Tp = kv_cache.pack(token_at(column_BxMxE + 1), kept_Tp)
        choice_TpxU, norm_Tp, next_log_p_Tp = self._scores(hidden_TpxD, next_Tp)
        edge_length_BxMx1 = trie.edge_length[node_BxM][:, :, None]
        is_forced_BxMxE = kept_BxMxE & (column_BxMxE + 1 < edge_length_BxMx1)
        forced_BxMxE = next_log_p_Tp.at[index_BxMxE].get(mode="clip")
        is_last_BxMxE = kept_BxMxE & (column_BxMxE == length_BxM[:, :, None] - 1)
        ends_BxM = jnp.any(is_last_BxMxE, axis=2)
        last_BxM = jnp.max(jnp.where(is_last_BxMxE, index_BxMxE, 0), axis=2)
        scores = EdgeScores(
            jnp.where(ends_BxM[:, :, None], choice_TpxU[last_BxM], scores.choice_BxMxU),
            jnp.where(ends_BxM, norm_Tp[last_BxM], scores.norm_BxM),
            scores.forced_BxM + jnp.sum(jnp.where(is_forced_BxMxE, forced_BxMxE, 0.0), axis=2),
        )
        return read_BxM + count_BxM, scores, kv_cache.pad_new_tokens(new, padded)

    def _scores(
        self, hidden_D: jax.Array, next_token: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(choice logits [..., U], norm [...], log-probability of next_token [...])."""
        count, *inner = hidden_D.shape[:-1]
        zeros = jnp.zeros((count, *inner))
        if not self.vocabulary:
            return self.model.head(self.trie.choice)(hidden_D) / self.temperature, zeros, zeros
        head = self.model.head()

        def scores(inputs):
            hidden_D, next_token = inputs
            logits_V = head(hidden_D) / self.temperature
            norm = jax.nn.logsumexp(logits_V, axis=-1)
            next_logit = jnp.take_along_axis(logits_V, next_token[..., None], axis=-1)[..., 0]
            choice_U = jnp.take(logits_V, self.trie.choice, axis=-1)
            return choice_U, norm, jnp.minimum(next_logit - norm, 0.0)

        inputs = hidden_D, zeros.astype(jnp.int32) if next_token is None else next_token
        vocabulary = jax.eval_shape(head, hidden_D).shape[-1]
        at_once = states_at_once(count, math.prod(inner) * vocabulary)
        if at_once == count:
            return scores(inputs)
        return jax.lax.map(scores, inputs, batch_size=at_once)
