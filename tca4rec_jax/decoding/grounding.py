"""Grounding (BIGRec, arXiv 2308.08434): free text first, then the titles that lie nearest to it.

The LLM generates a title that need not exist, by beam search over its vocabulary. The hidden state
of the title's last token, read alone, is compared with that of every title of the catalogue:

    score = -scaled(L2 distance) * (1 + scaled(CF score)) ** -guidance

where `scaled` takes a user's values from 0 to 1. Titles are compared as tokens, without a BOS token
before them. The catalogue's states are computed once for each model.

Axes: core/__init__.py; here Tg are generated tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.advance_beams import Prompts
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig
from tca4rec_jax.decoding.embedder import Embedder, ItemTexts, pooled
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import BeamCache, gather_beams, scatter_cache

_BUCKETS = 3  # padded lengths of titles, each compiled once


class TitleIndex(NamedTuple):
    """The catalogue's titles as one model reads them."""

    vectors_QxD: Array  # float32, the state at each title's last token
    end: Array  # int32 scalar, the token that ends a title

    @classmethod
    def of(cls, trie: ItemTrie, embedder: Embedder) -> "TitleIndex":
        """Of a token-by-token trie, on the host; `embedder` pools the last state.

        Raises UserError if the titles do not end with one token, or one has no other.
        """
        last_Q = trie.tokens_QxL[np.arange(trie.num_leaves), trie.lengths_Q - 1]
        if (last_Q != last_Q[0]).any() or trie.lengths_Q.min() < 2:
            raise UserError(
                "decoding.find is 'grounding', which ends a generated title at its end token: set "
                "prompt.end, or decoding.find=beams"
            )
        length_Q = trie.lengths_Q.astype(np.int64) - 1
        inside_QxL = np.arange(trie.tokens_QxL.shape[1]) < length_Q[:, None]
        tokens = Ragged.from_lengths(trie.tokens_QxL[inside_QxL], length_Q)
        texts = ItemTexts(tokens, np.zeros(len(length_Q), np.int32))
        order_Q = np.argsort(-length_Q, kind="stable")
        found = [*embedder.embed(texts, bucket_lengths(length_Q, _BUCKETS), order_Q)]
        vectors_QxD = np.concatenate(found)
        vectors_QxD[order_Q] = vectors_QxD.copy()
        return cls(vectors_QxD, np.asarray(last_Q[0]))


class _Drafts(NamedTuple):
    """Unfinished texts, and the best finished one, of each user."""

    step: jax.Array  # int32, tokens of an unfinished text
    tokens_BxMxTg: jax.Array
    total_BxM: jax.Array  # summed log-probabilities, -inf where there is no text
    best_BxTg: jax.Array
    length_B: jax.Array  # of the best
    score_B: jax.Array  # -inf where none is finished
    cache: BeamCache


def ground(
    model: Decoder,
    prompts: Prompts,
    titles: TitleIndex,
    trie: DeviceTrie,
    weights: ScoreWeights,
    config: SearchConfig,
    *,
    cf_logits_BxI: jax.Array | None = None,
    allowed_BxI: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The titles nearest to the text that follows each prompt, as `beam_search`; traceable.

    Returns (leaves int32 [B, M], -1 where there are no more; scores float32 [B, M], -inf there).
    """
    tokens_BxTg, length_B = generate(
        model,
        prompts,
        titles.end,
        beams=config.grounding_beams,
        most=config.grounding_tokens,
        temperature=weights.temperature,
        length_penalty=weights.length_penalty,
    )
    vector_BxD = pooled(model, tokens_BxTg, length_B - 1, length_B)
    score_BxQ = nearest_titles(
        vector_BxD,
        titles.vectors_QxD,
        trie,
        guidance=weights.guidance,
        cf_logits_BxI=cf_logits_BxI,
        allowed_BxI=allowed_BxI,
        renormalise=config.renormalise,
    )
    score_BxM, leaf_BxM = jax.lax.top_k(score_BxQ, min(config.beams, score_BxQ.shape[1]))
    missing = ((0, 0), (0, config.beams - score_BxM.shape[1]))
    score_BxM = jnp.pad(score_BxM, missing, constant_values=-jnp.inf)
    leaf_BxM = jnp.pad(leaf_BxM, missing)
    return jnp.where(score_BxM == -jnp.inf, -1, leaf_BxM), score_BxM


def generate(
    model: Decoder,
    prompts: Prompts,
    end: Array,
    *,
    beams: int,
    most: int,
    temperature: jax.Array | float,
    length_penalty: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """The best text of at most `most` tokens (Tg) after each prompt, by beam search; traceable.

    A text ends at the token `end` and scores its summed log-probabilities, this token's included,
    divided by (its tokens, this one included) ** length_penalty. The search ends when no unfinished
    text can become better; where none has ended by then the best unfinished one is taken.

    Returns (tokens int32 [B, Tg] without `end`, undefined after the length; length int32 [B]).
    """
    batch, head = prompts.length_B.shape[0], model.head()

    def choose(drafts: _Drafts, states_BxMxD: jax.Array) -> tuple[_Drafts, jax.Array]:
        log_p_BxMxV = jax.nn.log_softmax(head(states_BxMxD) / temperature, axis=-1)
        total_BxMxV = drafts.total_BxM[:, :, None] + log_p_BxMxV
        drafts = _end_texts(drafts, total_BxMxV[:, :, end], length_penalty)
        going_BxMxV = total_BxMxV.at[:, :, end].set(-jnp.inf)
        return _go_on(drafts, going_BxMxV, beams, (most + 1.0) ** length_penalty)

    def unfinished(drafts: _Drafts):
        return (drafts.step <= most) & jnp.any(drafts.total_BxM > -jnp.inf)

    def read(drafts: _Drafts) -> _Drafts:
        """Reads the newest token of every text, then chooses the next ones."""
        newest_BxM = jnp.take(drafts.tokens_BxMxTg, drafts.step - 1, axis=2)
        all_Tp, one_BxM = jnp.arange(batch * beams), jnp.ones((batch, beams), jnp.int32)
        after = prompts.kv, prompts.length_B, drafts.cache, all_Tp, beams
        hidden_TpxD, new = model.extend(newest_BxM[:, :, None], one_BxM, *after)
        cache = scatter_cache(drafts.cache, new)
        drafts, beam_BxM = choose(drafts, hidden_TpxD.reshape(batch, beams, -1))
        return drafts._replace(cache=gather_beams(cache, beam_BxM))

    # One place more than `most`: the last token chosen is read by nobody.
    nothing = _Drafts(
        step=jnp.int32(0),
        tokens_BxMxTg=jnp.zeros((batch, beams, most + 1), jnp.int32),
        total_BxM=jnp.zeros((batch, 1)),
        best_BxTg=jnp.zeros((batch, most + 1), jnp.int32),
        length_B=jnp.zeros(batch, jnp.int32),
        score_B=jnp.full(batch, -jnp.inf),
        cache=model.init_beam_cache(batch, beams, beams * most),
    )
    drafts, _ = choose(nothing, prompts.hidden_Bx1xD)
    drafts = jax.lax.while_loop(unfinished, read, drafts)
    ended_B = drafts.score_B > -jnp.inf
    tokens = jnp.where(ended_B[:, None], drafts.best_BxTg, drafts.tokens_BxMxTg[:, 0])
    return tokens[:, :most], jnp.where(ended_B, drafts.length_B, most)


def _end_texts(drafts: _Drafts, total_BxM: jax.Array, length_penalty: jax.Array | float) -> _Drafts:
    """The best finished text where one ends now, at these summed log-probabilities, is better."""
    ended_BxM = total_BxM / (drafts.step + 1).astype(jnp.float32) ** length_penalty
    at_B = jnp.argmax(ended_BxM, axis=1)[:, None]
    ended_B = jnp.take_along_axis(ended_BxM, at_B, axis=1)[:, 0]
    # A title has a token besides its end.
    better_B = (ended_B > drafts.score_B) & (drafts.step > 0)
    text_BxTg = jnp.take_along_axis(drafts.tokens_BxMxTg, at_B[:, :, None], axis=1)[:, 0]
    return drafts._replace(
        best_BxTg=jnp.where(better_B[:, None], text_BxTg, drafts.best_BxTg),
        length_B=jnp.where(better_B, drafts.step, drafts.length_B),
        score_B=jnp.where(better_B, ended_B, drafts.score_B),
    )


def _go_on(
    drafts: _Drafts, total_BxMxV: jax.Array, beams: int, longest: jax.Array | float
) -> tuple[_Drafts, jax.Array]:
    """The best texts of one more token, and int32 [B, M] which text each goes on from.

    `total_BxMxV` are their summed log-probabilities; `longest` is what those of a text of the
    greatest length are divided by.
    """
    batch = len(drafts.score_B)
    top_BxMxM, token_BxMxM = jax.lax.top_k(total_BxMxV, beams)
    total_BxM, chosen_BxM = jax.lax.top_k(top_BxMxM.reshape(batch, -1), beams)
    beam_BxM = chosen_BxM // beams
    token_BxM = jnp.take_along_axis(token_BxMxM.reshape(batch, -1), chosen_BxM, axis=1)
    tokens = jnp.take_along_axis(drafts.tokens_BxMxTg, beam_BxM[:, :, None], axis=1)
    # Totals only fall: a text can at best keep its own and grow to its greatest length.
    may_win_BxM = total_BxM / longest > drafts.score_B[:, None]
    return drafts._replace(
        step=drafts.step + 1,
        tokens_BxMxTg=tokens.at[:, :, drafts.step].set(token_BxM),
        total_BxM=jnp.where(may_win_BxM, total_BxM, -jnp.inf),
    ), beam_BxM


def nearest_titles(
    vector_BxD: jax.Array,
    vectors_QxD: Array,
    trie: DeviceTrie,
    *,
    guidance: jax.Array | float = 0.0,
    cf_logits_BxI: jax.Array | None = None,
    allowed_BxI: jax.Array | None = None,
    renormalise: bool = True,
) -> jax.Array:
    """The score of every title for each user, float32 [B, Q]: 0 at best, -inf where not allowed.

    The states of a generated title [B, D] and of every title [Q, D] are float32. A title has the CF
    logit of its best allowed item. `scaled` counts the titles of allowed items, or without
    `renormalise` all.
    """

    # Differences themselves: by products, that of a title to itself would not be 0.
    def distance_to(vector_D):
        return jnp.sqrt(jnp.sum(jnp.square(vectors_QxD - vector_D[None]), axis=1))

    distance_BxQ = jax.lax.map(distance_to, vector_BxD)
    allowed_BxQ = counted_BxQ = jnp.ones(distance_BxQ.shape, bool)
    if allowed_BxI is not None:
        allowed_BxQ = _best_of_titles(allowed_BxI, trie)
        counted_BxQ = allowed_BxQ if renormalise else counted_BxQ
    score_BxQ = -_scaled(distance_BxQ, counted_BxQ)
    if cf_logits_BxI is not None:
        if allowed_BxI is not None and renormalise:
            cf_logits_BxI = jnp.where(allowed_BxI, cf_logits_BxI, -jnp.inf)
        cf_BxQ = _scaled(_best_of_titles(cf_logits_BxI, trie), counted_BxQ)
        score_BxQ *= (1.0 + cf_BxQ) ** -guidance
    return jnp.where(allowed_BxQ, score_BxQ, -jnp.inf)


def _best_of_titles(values_BxI: jax.Array, trie: DeviceTrie) -> jax.Array:
    """[B, Q]: the greatest value of each title's items."""
    return jax.vmap(
        lambda values_I: jax.ops.segment_max(
            values_I[trie.item_order],
            trie.ordered_leaf,
            trie.sizes.num_leaves,
            indices_are_sorted=True,
        )
    )(values_BxI)


def _scaled(values_BxQ: jax.Array, counted_BxQ: jax.Array) -> jax.Array:
    """From 0 to 1 among the counted values of a row; 0 where they are all the same."""
    lowest, highest = (
        reduce(values_BxQ, axis=1, keepdims=True, where=counted_BxQ, initial=initial)
        for reduce, initial in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    )
    width = jnp.where(highest > lowest, highest - lowest, 1.0)
    return jnp.where(counted_BxQ, (values_BxQ - lowest) / width, 0.0)
