"""What an LLM writes and expects without the trie, and which of its decisions are good ones.

A sample of the rows is read once: the prompt with the title that came next, and after the prompt
the LLM writes freely.

Axes: core/__init__.py; here K are scored tokens, Tg generated ones.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding.advance_beams import Prompts
from tca4rec_jax.decoding.engine import BatchedSearch, SearchRows
from tca4rec_jax.decoding.likelihood import ScoredTokens, scored_titles, token_log_probs
from tca4rec_jax.decoding.search_programs import SearchProgram, prefill_prompts
from tca4rec_jax.distributed import sharding
from tca4rec_jax.distributed.multihost import gather_to_host
from tca4rec_jax.evaluation.llm_rankings import Ranker
from tca4rec_jax.evaluation.rankings import EvaluationRows, sample_rows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import BeamCache, scatter_cache
from tca4rec_jax.llm.projector import SoftTokens

ROWS = 128
"""The rows, at most, that are read: a small part of what ranking all of them costs."""

_BUCKETS = 2  # padded lengths of texts, each compiled once


class _Found(NamedTuple):
    """Of a batch; the likelihoods are 0 at padding."""

    decision_BxK: Array  # float32, -log P of the decisions among the children
    token_BxK: Array  # float32, -log P of the title's tokens in the vocabulary
    text_BxTg: Array  # int32, what was written, undefined after the length
    length_B: Array  # int32


class _Batch(NamedTuple):
    tokens_BxS: Array  # int32, prompts and titles
    length_B: Array  # int32, of the prompts
    decisions: ScoredTokens
    tokens: ScoredTokens
    soft: SoftTokens | None


def fluency(experiment: Experiment, rows: EvaluationRows, decoder: Decoder) -> dict[str, Any]:
    """Numbers of at most ROWS of the rows, the same ones for every model.

    'perplexity': of the tokens of the titles that came next, among the whole vocabulary.
    'written titles': the share of prompts after which the LLM, always with its likeliest next
    token, writes a title of the catalogue though no trie holds it to one; left out if titles have
    no end token in common. 'nll by decision', 'rows by decision': mean of -log P of a title's
    first, second .. decision among the children of the trie, and over how many rows. 'rows': how
    many were read.
    """
    rows = _some(rows, experiment.config.evaluation.seed)
    ranker = Ranker.of(experiment, rows)
    search, trie = ranker.search, ranker.search.host_trie
    end = _end_token(trie)
    (_, decisions), (titles, tokens) = (
        scored_titles(trie, rows.target_R, dataclasses.replace(search.config, mask=mask))
        for mask in ("before_softmax", "after_softmax")
    )
    searched, scored = ranker.searched, (decisions, tokens)
    found = _read_rows(search, searched, searched.prompts.followed_by(titles), scored, decoder, end)
    counts_K = decisions.weight.sum(axis=0).astype(int)
    made = counts_K > 0
    numbers = {
        "rows": len(rows),
        "perplexity": float(np.exp(found.token_BxK.sum() / tokens.weight.sum())),
        "nll by decision": (found.decision_BxK.sum(axis=0)[made] / counts_K[made]).tolist(),
        "rows by decision": counts_K[made].tolist(),
    }
    if end is None:
        return numbers
    valid_R = _are_titles(trie, found.text_BxTg, found.length_B)
    return numbers | {"written titles": float(valid_R.mean())}


def _some(rows: EvaluationRows, seed: int) -> EvaluationRows:
    """At most ROWS of the rows."""
    index_R = sample_rows(len(rows), ROWS, seed)
    candidates_RxN = rows.candidates_RxN
    return dataclasses.replace(
        rows,
        sequences=rows.sequences.take(index_R),
        position_R=rows.position_R[index_R],
        history_RxH=rows.history_RxH[index_R],
        target_R=rows.target_R[index_R],
        candidates_RxN=None if candidates_RxN is None else candidates_RxN[index_R],
    )


def _end_token(trie: ItemTrie) -> int | None:
    """The token that ends every title of a trie token by token; None if they end otherwise."""
    last_Q = trie.tokens_QxL[np.arange(trie.num_leaves), trie.lengths_Q - 1]
    return None if (last_Q != last_Q[0]).any() or trie.lengths_Q.min() < 2 else int(last_Q[0])


def _are_titles(trie: ItemTrie, text_RxTg: Array, length_R: Array) -> np.ndarray:
    """bool [R]: whether a text, ended where its length says, is a title."""
    places = np.arange(text_RxTg.shape[1])
    inside_QxTg = places < (trie.lengths_Q - 1)[:, None]
    title_QxTg = np.where(inside_QxTg, trie.tokens_QxL[:, : len(places)], -1)
    text_RxTg = np.where(places < length_R[:, None], text_RxTg, -1)
    both = np.concatenate([title_QxTg, text_RxTg])
    _, number = np.unique(both, axis=0, return_inverse=True)
    return np.isin(number[len(title_QxTg) :], number[: len(title_QxTg)])


def _read_rows(
    search: BatchedSearch,
    rows: SearchRows,
    texts: Ragged,
    scored: tuple[ScoredTokens, ScoredTokens],
    decoder: Decoder,
    end: int | None,
) -> _Found:
    """What a decoder does on all rows, in their order; nothing is written without an end token.

    The texts are prompts and titles, `scored` the titles' decisions and tokens.
    """
    mesh = search.mesh
    graph, state = nnx.split(decoder)
    state = sharding.put(state, sharding.tree_shardings(mesh, decoder.config, state))
    trie = sharding.put(DeviceTrie.of(search.host_trie.compress()), sharding.replicated(mesh))
    read = partial(
        _read,
        trie=trie,
        end=np.int32(end or 0),
        program=SearchProgram(mesh, graph, search.config),
        # One more than any title has without its end: what has not ended by then is none.
        most=0 if end is None else search.host_trie.tokens_QxL.shape[1],
    )
    batches = _batches(search, rows, texts, scored)
    dispatched = itertools.chain(((rows_B, read(state, batch)) for rows_B, batch in batches), [()])
    order, parts = [], []
    for (rows_B, found), _ in itertools.pairwise(dispatched):  # the next is dispatched already
        order.append(rows_B)
        parts.append([field[: len(rows_B)] for field in gather_to_host(found)])
    place_R = np.argsort(np.concatenate(order))
    return _Found(*(np.concatenate(field)[place_R] for field in zip(*parts, strict=True)))


def _batches(
    search: BatchedSearch,
    rows: SearchRows,
    texts: Ragged,
    scored: tuple[ScoredTokens, ScoredTokens],
) -> Iterator[tuple[np.ndarray, _Batch]]:
    """(row numbers int64, the batch on the devices), the longest texts first."""
    buckets, order_R = bucket_lengths(texts.lengths, _BUCKETS), np.argsort(-texts.lengths)
    size = search.sizes(texts.lengths).batch_size
    here_B = sharding.local_rows(search.mesh, size, "prompts")

    def batch(padded_B: np.ndarray, width: int) -> _Batch:
        decisions, tokens = jax.tree.map(lambda field: field[padded_B], scored)
        tokens_BxS = texts.pad(padded_B, width, 0).astype(np.int32)
        length_B = rows.prompts.lengths[padded_B].astype(np.int32)
        soft = rows.soft and rows.soft(padded_B, width)
        return _Batch(tokens_BxS, length_B, decisions, tokens, soft)

    for start in range(0, len(order_R), size):
        rows_B = order_R[start : start + size]
        width = int(buckets[np.searchsorted(buckets, texts.lengths[rows_B[0]])])
        made = batch(np.resize(rows_B, size)[here_B], width)
        yield rows_B, sharding.shard_batch(search.mesh, made, "prompts")


@partial(jax.jit, static_argnames=("program", "most"))
def _read(
    state: nnx.State,
    batch: _Batch,
    *,
    trie: DeviceTrie,
    end: Array,
    program: SearchProgram,
    most: int,
) -> _Found:
    def read(model, batch, trie, end):
        soft = batch.soft if model.projector is not None else None
        places = jnp.concatenate([batch.decisions.position, batch.tokens.position], axis=1)
        texts = batch.tokens_BxS, batch.length_B, places
        states_BxKxD, prompts = prefill_prompts(model, *texts, soft=soft)
        after = states_BxKxD[:, 1:]  # the first is the prompt's own
        split = batch.decisions.position.shape[1]
        decision_BxK = _nll(model, after[:, :split], batch.decisions, trie)
        token_BxK = _nll(model, after[:, split:], batch.tokens, trie)
        text_BxTg, length_B = jnp.zeros((len(batch.length_B), 0), jnp.int32), batch.length_B
        if most:
            text_BxTg, length_B = write_freely(model, prompts, end, most)
        return _Found(decision_BxK, token_BxK, text_BxTg, length_B)

    rows = sharding.RULES.spec(("prompts",))
    specs = (rows, PartitionSpec(), PartitionSpec())
    return program.run(read, (state, batch, trie, end), specs, rows)


def _nll(
    model: Decoder, states_BxKxD: jax.Array, scored: ScoredTokens, trie: DeviceTrie
) -> jax.Array:
    """float32 [B, K]: -log P of the scored tokens, 0 at padding."""
    log_p_BxKx1 = token_log_probs(model, states_BxKxD, scored, trie, jnp.ones(1))
    return jnp.where(jnp.asarray(scored.weight) > 0, -log_p_BxKx1[:, :, 0], 0.0)


class _Writing(NamedTuple):
    """Unfinished texts."""

    step: jax.Array  # int32, tokens that were written
    newest_B: jax.Array  # int32, the next ones
    text_BxTg: jax.Array
    length_B: jax.Array  # of the texts that have ended; Tg of the others
    cache: BeamCache


def write_freely(
    model: Decoder, prompts: Prompts, end: jax.Array, most: int
) -> tuple[jax.Array, jax.Array]:
    """The text after each prompt, always with the likeliest next token; traceable.

    Returns (tokens int32 [B, Tg], undefined after the length; length int32 [B], without the token
    `end`, or `most` (Tg) of a text that has not ended by then).
    """
    head, batch = model.head(), len(prompts.length_B)

    def likeliest(hidden_BxD: jax.Array) -> jax.Array:
        return jnp.argmax(head(hidden_BxD), axis=-1).astype(jnp.int32)

    def unfinished(writing: _Writing) -> jax.Array:
        return (writing.step < most) & jnp.any(writing.length_B == most)

    def go_on(writing: _Writing) -> _Writing:
        step, newest_B, text_BxTg, length_B, cache = writing
        one_Bx1 = jnp.ones((batch, 1), jnp.int32)
        hidden_BxD, new = model.extend(
            newest_B[:, None, None],
            one_Bx1,
            prompts.kv,
            prompts.length_B,
            cache,
            jnp.arange(batch),
            1,
        )
        ended_B = jnp.where(newest_B == end, jnp.minimum(length_B, step), length_B)
        text_BxTg = text_BxTg.at[:, step].set(newest_B)
        cache = scatter_cache(cache, new)
        return _Writing(step + 1, likeliest(hidden_BxD), text_BxTg, ended_B, cache)

    nothing = _Writing(
        step=jnp.int32(0),
        newest_B=likeliest(prompts.hidden_Bx1xD[:, 0]),
        text_BxTg=jnp.zeros((batch, most), jnp.int32),
        length_B=jnp.full(batch, most, jnp.int32),
        cache=model.init_beam_cache(batch, 1, most),
    )
    writing = jax.lax.while_loop(unfinished, go_on, nothing)
    return writing.text_BxTg, writing.length_B
