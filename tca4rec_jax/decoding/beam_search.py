"""Beam search over the item trie: every result is an item of the catalogue.

Two score conventions. 'after_softmax' takes the log-softmax over the whole vocabulary and then
masks (what the published evaluation does); it walks the trie token by token. 'before_softmax' masks
and then takes the log-softmax over the allowed children (consistent with MSL, arXiv 2504.04178); a
forced token then has log-probability 0, so the compressed trie is walked, one decision per step.

Guidance adds lambda * log p_cf(token | prefix) (the Collaborative Tokenizer's distribution).

Axis letters: B batch (users), S prompt tokens, M beams, C children of a node, X candidates of one
step, E edge tokens of one call, F edge tokens in all, W suffix tokens, D model, V vocabulary,
I items, N trie nodes.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tca4rec_jax.collaborative_tokenizer import node_log_mass
from tca4rec_jax.decoding.search_trie import SearchShape, SearchTrie

SCORES = ("before_softmax", "after_softmax")
RULES = ("exact", "huggingface")


@dataclass(frozen=True)
class SearchConfig:
    """What is searched for and how it is scored; hashable, a static argument of jit.

    Attributes:
      beams: unfinished hypotheses kept per user, and the length of the result.
      score: 'before_softmax' or 'after_softmax', see the module.
      rules: 'exact' accepts every finished hypothesis and ends when no unfinished one can reach the
        result any more; 'huggingface' is what the published evaluation ran: a hypothesis may finish
        only from among the best `beams` candidates of its step, and the search for a user ends when
        the best unfinished score over its *present* length is no better than the worst kept.
      edge_chunk: edge tokens run by one call of the LLM (compressed trie only). Most edges into
        decisions are one token (300 of 355 on MovieLens-100K), so 1 is fastest on CPU; a larger
        chunk means fewer calls, each with more padding.
    """

    beams: int = 10
    score: str = "before_softmax"
    rules: str = "exact"
    edge_chunk: int = 1

    def __post_init__(self):
        if self.beams < 1 or self.edge_chunk < 1:
            raise ValueError(f"beams and edge_chunk must be at least 1, got {self}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}")
        if self.rules not in RULES:
            raise ValueError(f"rules must be one of {RULES}, got {self.rules!r}")

    @property
    def compress(self) -> bool:
        """Whether the compressed trie is searched."""
        return self.score == "before_softmax"


class ScoreWeights(NamedTuple):
    """Numbers of the score that may change without recompilation (float scalars).

    The score of a finished hypothesis is
    sum over tokens (log P_LLM(token; logits / temperature) + guidance * log p_cf(token; beta))
    divided by (number of tokens, end token included) ** length_penalty.
    """

    guidance: float = 0.0
    beta: float = 1.0
    temperature: float = 1.0
    length_penalty: float = 0.0

    def check(self) -> "ScoreWeights":
        """Returns itself; raises ValueError for values the search is not defined for."""
        if min(self.guidance, self.length_penalty) < 0 or min(self.beta, self.temperature) <= 0:
            raise ValueError(
                "guidance and length_penalty must be at least 0, beta and temperature above 0, "
                f"got {self}"
            )
        return self


class LanguageModel(Protocol):
    """What the search asks of a model; see llm.decoder.Decoder."""

    def prefill(self, tokens_BxS, lengths_B): ...

    def extend(self, tokens_BxMxE, prompt, prompt_lengths_B, suffix, suffix_lengths_BxM): ...

    def logits(self, hidden_D): ...

    def empty_suffix(self, batch: int, beams: int, size: int): ...


class SearchResult(NamedTuple):
    """Best first: leaves int32 [B, M] (-1: none) and scores float32 [B, M] (-inf: none).

    calls: int32 scalar, how often the LLM was called after the prompt.
    """

    leaves: jax.Array
    scores: jax.Array
    calls: jax.Array


class _State(NamedTuple):
    node_BxM: jax.Array  # unfinished hypotheses; the edge into the node has not been run yet
    total_BxM: jax.Array  # their summed log-probabilities, -inf for an empty slot
    leaf_BxM: jax.Array  # finished hypotheses, best first
    score_BxM: jax.Array
    suffix: object  # keys and values of the tokens before each unfinished hypothesis' edge
    calls: jax.Array


def beam_search(
    model: LanguageModel,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    cf_logits_BxI: jax.Array | None,
    trie: SearchTrie,
    weights: ScoreWeights,
    *,
    shape: SearchShape,
    config: SearchConfig,
) -> SearchResult:
    """Prefills the prompts once and searches; one traceable program without a Python loop.

    Args:
      model: a Decoder (or anything with its four methods).
      tokens_BxS: int32 prompts, padded on the right; lengths_B: int32.
      cf_logits_BxI: float CF logits of all items for each user; None switches guidance off.
      trie, shape: from `search_trie(..., compress=config.compress, edge_chunk=config.edge_chunk)`.
      weights: see ScoreWeights.

    Returns:
      The `config.beams` best sequences of each user, all different; fewer if the catalogue has
      fewer (or the search found fewer). Equal scores keep the order in which they were found.
    """
    hidden_Bx1xD, prompt = run_prompts(model, tokens_BxS, lengths_B)
    return search_from_prompt(
        model, hidden_Bx1xD, prompt, lengths_B, cf_logits_BxI, trie, weights,
        shape=shape, config=config,
    )  # fmt: skip


def run_prompts(model: LanguageModel, tokens_BxS: jax.Array, lengths_B: jax.Array):
    """(hidden [B, 1, D] at each prompt's last token, the prompts' keys and values)."""
    hidden_BxSxD, prompt = model.prefill(tokens_BxS, lengths_B)
    last_Bx1x1 = (lengths_B - 1)[:, None, None]
    return jnp.take_along_axis(hidden_BxSxD, last_Bx1x1, axis=1), prompt


def search_from_prompt(
    model: LanguageModel,
    hidden_Bx1xD: jax.Array,
    prompt: object,
    prompt_lengths_B: jax.Array,
    cf_logits_BxI: jax.Array | None,
    trie: SearchTrie,
    weights: ScoreWeights,
    *,
    shape: SearchShape,
    config: SearchConfig,
    allowed_BxI: jax.Array | None = None,
) -> SearchResult:
    """`beam_search` after the prompt: from its last hidden state and its keys and values.

    allowed_BxI (bool) leaves items out: what is found is what a trie of the allowed items alone
    would give, whatever the score; a title is a candidate while one of its items is allowed.
    """
    mass_BxN, alive_BxN = None, None
    if allowed_BxI is not None:
        present_BxI = jnp.where(allowed_BxI, 0.0, -jnp.inf)
        alive_BxN = node_log_mass(present_BxI, trie.mass, shape.mass) > -jnp.inf
    if cf_logits_BxI is not None:
        if allowed_BxI is not None:
            cf_logits_BxI = jnp.where(allowed_BxI, cf_logits_BxI, -jnp.inf)
        mass_BxN = node_log_mass(cf_logits_BxI, trie.mass, shape.mass, weights.beta)
    batch, beams = hidden_Bx1xD.shape[0], config.beams

    def expand(hidden, node, total, children: int):
        """Candidates [B, X] of the hypotheses at `node`, their edges having been run."""
        child, log_p = _child_log_probs(
            model.logits(hidden),
            node,
            mass_BxN,
            alive_BxN,
            trie,
            weights,
            children,
            config.compress,
        )
        candidates = total[:, :, None] + log_p
        return child.reshape(batch, -1), candidates.reshape(batch, -1)

    def step(state: _State) -> _State:
        hidden_BxMxD, suffix, calls = _run_edges(
            model, state, prompt, prompt_lengths_B, trie, shape.edge_chunk
        )
        child_BxX, total_BxX = expand(
            hidden_BxMxD, state.node_BxM, state.total_BxM, shape.inner_children
        )
        state, chosen_BxM = _select(state, child_BxX, total_BxX, trie, weights, config)
        return state._replace(
            suffix=_take_beams(suffix, chosen_BxM // shape.inner_children),
            calls=state.calls + calls,
        )

    root_Bx1 = jnp.zeros((batch, 1), jnp.int32)
    child_BxX, total_BxX = expand(
        hidden_Bx1xD, root_Bx1, jnp.zeros((batch, 1)), shape.root_children
    )
    nothing_BxM = jnp.full((batch, beams), -jnp.inf)
    start = _State(
        node_BxM=jnp.zeros((batch, beams), jnp.int32),
        total_BxM=nothing_BxM,
        leaf_BxM=jnp.full((batch, beams), -1, jnp.int32),
        score_BxM=nothing_BxM,
        suffix=model.empty_suffix(batch, beams, shape.suffix_size),
        calls=jnp.int32(0),
    )
    state, _ = _select(start, child_BxX, total_BxX, trie, weights, config)
    state = jax.lax.while_loop(lambda s: jnp.any(s.total_BxM > -jnp.inf), step, state)
    return SearchResult(state.leaf_BxM, state.score_BxM, state.calls)


def _child_log_probs(
    logits_BxMxV, node_BxM, mass_BxN, alive_BxN, trie, weights, children, masked_softmax
):
    """(child node ids, log-probabilities of the step to them) [B, M, C]; -inf: no such child."""
    offset_C = jnp.arange(children, dtype=jnp.int32)
    valid_BxMxC = offset_C[None, None, :] < trie.child_count[node_BxM][:, :, None]
    child_BxMxC = trie.child_start[node_BxM][:, :, None] + offset_C[None, None, :]
    child_BxMxC = jnp.where(valid_BxMxC, child_BxMxC, 0)
    if alive_BxN is not None:
        valid_BxMxC &= _per_user(alive_BxN, trie.mass_node[child_BxMxC])
    logits_BxMxV = logits_BxMxV / weights.temperature
    token_BxMxC = jnp.maximum(trie.token[child_BxMxC], 0)  # the root has no token
    logit_BxMxC = jnp.take_along_axis(logits_BxMxV, token_BxMxC, axis=-1)
    logit_BxMxC = jnp.where(valid_BxMxC, logit_BxMxC, -jnp.inf)
    allowed = logit_BxMxC if masked_softmax else logits_BxMxV
    log_p_BxMxC = logit_BxMxC - jax.nn.logsumexp(allowed, axis=-1, keepdims=True)
    if mass_BxN is not None:
        # Node ids of the compressed trie, flattened to one gather per user.
        child_mass = _per_user(mass_BxN, trie.mass_node[child_BxMxC])
        node_mass = _per_user(mass_BxN, trie.mass_node[node_BxM])
        log_cf_BxMxC = jnp.minimum(child_mass - node_mass[:, :, None], 0.0)
        log_p_BxMxC += jnp.where(weights.guidance > 0, weights.guidance * log_cf_BxMxC, 0.0)
    # A log-probability above 0 can only be rounding; the pruning bound relies on there being none.
    return child_BxMxC, jnp.where(valid_BxMxC, jnp.minimum(log_p_BxMxC, 0.0), -jnp.inf)


def _per_user(values_BxN: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, ...]] with the shape of index."""
    flat = jnp.take_along_axis(values_BxN, index.reshape(index.shape[0], -1), axis=1)
    return flat.reshape(index.shape)


def _run_edges(model, state, prompt, prompt_lengths_B, trie, edge_chunk):
    """Runs the LLM along the edges into the unfinished hypotheses' nodes.

    Returns:
      (hidden [B, M, D] at the last token of each edge, the new suffix, calls of the LLM).
    """
    # An empty slot stands at the root: no edge, nothing that could make the loop longer.
    length_BxM = trie.edge_length[state.node_BxM]
    start_BxM = trie.depth[state.node_BxM] - length_BxM
    edge_BxMxF = trie.edge_tokens[state.node_BxM]

    def run(chunk, suffix):
        first = chunk * edge_chunk
        tokens_BxMxE = jax.lax.dynamic_slice_in_dim(edge_BxMxF, first, edge_chunk, axis=2)
        # Hypotheses whose edge ended earlier write padding after their last token: harmless.
        done_BxM = jnp.minimum(first, length_BxM)
        hidden_BxMxExD, suffix = model.extend(
            tokens_BxMxE, prompt, prompt_lengths_B, suffix, start_BxM + done_BxM
        )
        last_BxM = length_BxM - 1 - first
        here_BxM = (last_BxM >= 0) & (last_BxM < edge_chunk)
        index_BxM = jnp.clip(last_BxM, 0, edge_chunk - 1)
        hidden_BxMx1xD = jnp.take_along_axis(hidden_BxMxExD, index_BxM[:, :, None, None], axis=2)
        return hidden_BxMx1xD[:, :, 0, :], here_BxM, suffix

    hidden_BxMxD, _, suffix = run(0, state.suffix)
    if edge_BxMxF.shape[2] == edge_chunk:
        return hidden_BxMxD, suffix, jnp.int32(1)

    def more(carry):
        chunk, hidden_BxMxD, suffix = carry
        new_BxMxD, here_BxM, suffix = run(chunk, suffix)
        return chunk + 1, jnp.where(here_BxM[:, :, None], new_BxMxD, hidden_BxMxD), suffix

    chunks = -(-jnp.max(length_BxM) // edge_chunk)
    _, hidden_BxMxD, suffix = jax.lax.while_loop(
        lambda carry: carry[0] < chunks, more, (jnp.int32(1), hidden_BxMxD, suffix)
    )
    return hidden_BxMxD, suffix, chunks


def _select(state, child_BxX, total_BxX, trie, weights, config):
    """Merges finished candidates into the result and keeps the best unfinished ones.

    Returns:
      (state, index of the candidate in each unfinished slot [B, M]).
    """
    beams = config.beams
    penalty = weights.length_penalty
    leaf_BxX = trie.leaf[child_BxX]
    finished_BxX = leaf_BxX >= 0
    score_BxX = total_BxX / trie.depth[child_BxX].astype(jnp.float32) ** penalty
    if config.rules == "huggingface":
        best_BxM, _ = _top(total_BxX, beams)
        finished_BxX &= total_BxX >= best_BxM[:, -1:]
    pool_score = jnp.concatenate(
        [state.score_BxM, jnp.where(finished_BxX, score_BxX, -jnp.inf)], axis=1
    )
    pool_leaf = jnp.concatenate([state.leaf_BxM, leaf_BxX], axis=1)
    kept_score_BxM, kept = _top(pool_score, beams)
    kept_leaf_BxM = jnp.take_along_axis(pool_leaf, kept, axis=1)
    kept_leaf_BxM = jnp.where(kept_score_BxM > -jnp.inf, kept_leaf_BxM, -1)

    # Totals only fall (every step adds at most 0), so a hypothesis can at best keep its total and
    # end with the longest sequence below it.
    worst_Bx1 = kept_score_BxM[:, -1:]
    total_BxX = jnp.where(leaf_BxX < 0, total_BxX, -jnp.inf)
    if config.rules == "exact":
        bound_BxX = total_BxX / trie.longest[child_BxX].astype(jnp.float32) ** penalty
        total_BxX = jnp.where(bound_BxX > worst_Bx1, total_BxX, -jnp.inf)
    live_BxM, chosen_BxM = _top(total_BxX, beams)
    node_BxM = jnp.take_along_axis(child_BxX, chosen_BxM, axis=1)
    if config.rules == "huggingface":
        depth_Bx1 = trie.depth[node_BxM[:, :1]].astype(jnp.float32)
        goes_on_Bx1 = live_BxM[:, :1] / depth_Bx1**penalty > worst_Bx1
        live_BxM = jnp.where(goes_on_Bx1, live_BxM, -jnp.inf)
    node_BxM = jnp.where(live_BxM > -jnp.inf, node_BxM, 0)
    state = state._replace(
        node_BxM=node_BxM, total_BxM=live_BxM, leaf_BxM=kept_leaf_BxM, score_BxM=kept_score_BxM
    )
    return state, chosen_BxM


def _top(values_BxX: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values and their indices; -inf and index 0 where X is smaller."""
    available = min(count, values_BxX.shape[1])
    top, index = jax.lax.top_k(values_BxX, available)
    missing = ((0, 0), (0, count - available))
    return jnp.pad(top, missing, constant_values=-jnp.inf), jnp.pad(index, missing)


def _take_beams(suffix, beam_BxM: jax.Array):
    """suffix [L, B, M, ...] with the beams of each user rearranged."""

    def take(values):
        return jax.vmap(lambda one, beam: one[:, beam], in_axes=(1, 0), out_axes=1)(
            values, beam_BxM
        )

    return jax.tree.map(take, suffix)
