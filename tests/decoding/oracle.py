"""Exhaustive scoring: every title, token by token, with a dictionary trie, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, beam_search
from tca4rec_jax.decoding.search_programs import prefill_prompts
from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.decoder import Decoder, init_params

END = 0
VOCABULARY = 14
# Prefix titles, duplicated titles, long shared stretches, early and late decisions.
WORDS = (
    [1, 2], [1, 2, 3], [4, 5, 6, 7, 8, 9], [1, 2, 3], [4, 5, 6, 7, 8, 2], [4, 5, 6, 7, 8, 9, 1, 1],
    [9], [2, 2, 2, 2, 2], [3, 1], [9], [4, 5, 6, 7, 8, 9, 1, 3, 3], [10, 11, 12], [10, 11, 13, 2],
    [1, 2, 3],
)  # fmt: skip


def tiny_decoder(seed=0, vocab_size=VOCABULARY):
    config = DecoderConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=4, max_positions=64, tie_embeddings=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(seed))
    # Larger embeddings than at initialisation: the distributions are far from uniform.
    return Decoder(config, params | {"embedding": 4 * params["embedding"]})


def with_end(words):
    return [[*word, END] for word in words]


def prompts(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(1, length + 1, batch).astype(np.int32)
    tokens_BxS = rng.integers(1, VOCABULARY, (batch, length)).astype(np.int32)
    return np.where(np.arange(length) < lengths_B[:, None], tokens_BxS, 0), lengths_B


@nnx.jit
def _full_logits(decoder, tokens_BxS, lengths_B):
    return decoder.head()(decoder.hidden(tokens_BxS, lengths_B))


def _logsumexp(values):
    highest = np.max(values)
    return highest + np.log(np.sum(np.exp(values - highest)))


def exhaustive_scores(decoder, prompt, sequences, mask, weights, cf_logits_I=None):
    """{title tokens: score} of every distinct title after one prompt (a list of tokens)."""
    children = {}
    for sequence in sequences:
        for t, token in enumerate(sequence):
            children.setdefault(tuple(sequence[:t]), set()).add(token)
    titles = sorted(set(map(tuple, sequences)))
    # Two shapes for every test: two compilations.
    texts = np.zeros((16 if len(titles) <= 16 else 64, 32), np.int32)
    lengths = np.ones(len(texts), np.int32)
    for number, title in enumerate(titles):
        lengths[number] = len(prompt) + len(title)
        texts[number, : lengths[number]] = [*prompt, *title]
    logits = np.asarray(_full_logits(decoder, jnp.asarray(texts), jnp.asarray(lengths)), np.float64)
    logits /= weights.temperature

    def cf_mass(prefix):
        below = [i for i, s in enumerate(sequences) if tuple(s[: len(prefix)]) == prefix]
        return _logsumexp(np.asarray(cf_logits_I, np.float64)[below] / weights.beta)

    scores = {}
    for number, title in enumerate(titles):
        total = 0.0
        for t, token in enumerate(title):
            z = logits[number, len(prompt) + t - 1]
            allowed = sorted(children[title[:t]]) if mask == "before_softmax" else slice(None)
            total += z[token] - _logsumexp(z[allowed])
            if cf_logits_I is not None:
                total += weights.guidance * (cf_mass(title[: t + 1]) - cf_mass(title[:t]))
        scores[title] = total / len(title) ** weights.length_penalty
    return scores


@functools.partial(jax.jit, static_argnames=("graph", "config"))
def _search(state, tokens, lengths, cf_logits, allowed, trie, weights, *, graph, config):
    decoder = nnx.merge(graph, state)
    _, prompts = prefill_prompts(decoder, tokens, lengths)
    return beam_search(
        decoder, prompts, trie, weights, config, cf_logits_BxI=cf_logits, allowed_BxI=allowed
    )


def run_search(
    decoder, trie, tokens_BxS, lengths_B, cf_logits_BxI, weights, config,
    *, device_trie=None, allowed_BxI=None,
):  # fmt: skip
    """(leaves, scores, calls) as NumPy arrays."""
    graph, state = nnx.split(decoder)
    device_trie = device_trie or config.device_trie(trie)
    weights = ScoreWeights(*map(float, weights))
    result = _search(
        state, tokens_BxS, lengths_B, cf_logits_BxI, allowed_BxI, device_trie, weights,
        graph=graph, config=config,
    )  # fmt: skip
    return jax.tree.map(np.asarray, result)


__all__ = ["SearchConfig", "exhaustive_scores", "prompts", "run_search", "tiny_decoder", "with_end"]
