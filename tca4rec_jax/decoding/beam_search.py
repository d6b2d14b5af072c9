"""Beam search over the item trie: every result is an item of the catalogue.

Two score conventions. 'after_softmax' takes the log-softmax over the whole vocabulary and then
masks (what the published evaluation does). 'before_softmax' masks and then takes the log-softmax
over the allowed children (consistent with MSL, arXiv 2504.04178): a forced token has
log-probability 0, so a title is scored by its decisions and is never read to its end.

The compressed trie is walked, one decision per step; what is forced after a decision is read in as
few calls of the LLM as it fits. Only 'after_softmax' with the rules of 'huggingface' goes token by
token: there a hypothesis can be dropped in the middle of a forced stretch.

Guidance adds lambda * log p_cf(token | prefix) (the Collaborative Tokenizer's distribution).

Axis letters: B batch (users), S prompt tokens, M beams, C children of a node, X candidates of one
step, U tokens that some node chooses from, D model, V vocabulary, I items,
N trie nodes.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tca4rec_jax.core.collaborative_tokenizer import node_log_mass
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.decoding.advance_beams import EdgeScores, run_edges, scores_of_hidden
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.kv_cache import BeamCache, gather_beams, grow_cache

SCORES = ("before_softmax", "after_softmax")
RULES = ("exact", "huggingface")
_FIRST_READS = 8  # tokens per beam
_FIRST_BOUND = 16


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
      edge_chunk: most tokens of one edge that a call of the LLM reads (compressed trie only).
    """

    beams: int = 10
    score: str = "before_softmax"
    rules: str = "exact"
    edge_chunk: int = 8

    def __post_init__(self):
        if self.beams < 1 or self.edge_chunk < 1:
            raise UserError(f"beams and edge_chunk must be at least 1, got {self}")
        if self.score not in SCORES:
            raise UserError(f"score must be one of {SCORES}, got {self.score!r}")
        if self.rules not in RULES:
            raise UserError(f"rules must be one of {RULES}, got {self.rules!r}")

    @property
    def compress(self) -> bool:
        """Whether the compressed trie is searched."""
        return self.score == "before_softmax" or self.rules == "exact"

    @property
    def vocabulary(self) -> bool:
        """Whether the softmax is over the vocabulary, so that forced tokens count."""
        return self.score == "after_softmax"


class ScoreWeights(NamedTuple):
    """Numbers of the score that may change without recompilation (float scalars).

    The score of a finished hypothesis is
    sum over tokens (log P_LLM(token; logits / temperature) + guidance * log p_cf(token; beta))
    divided by (number of tokens, end token included) ** length_penalty.

    Attributes:
      guidance: weight of the Collaborative Tokenizer's distribution, lambda; at least 0.
      beta: temperature of the CF logits, above 0.
      temperature: of the LLM's logits, above 0.
      length_penalty: exponent of the length; 0 compares sums of log-probabilities, 1 means.
    """

    guidance: float = 0.0
    beta: float = 1.0
    temperature: float = 1.0
    length_penalty: float = 0.0

    def check(self) -> "ScoreWeights":
        """Returns itself; raises UserError for values the search is not defined for."""
        if min(self.guidance, self.length_penalty) < 0 or min(self.beta, self.temperature) <= 0:
            raise UserError(
                "guidance and length_penalty must be at least 0, beta and temperature above 0, "
                f"got {self}"
            )
        return self


class LanguageModel(Protocol):
    """What the search asks of a model; see llm.decoder.Decoder."""

    def prefill(self, tokens_BxS, lengths_B, *, lower=None): ...

    def extend(
        self, tokens_BxMxE, count_BxM, prompt, prompt_lengths_B, beams, kept_T=None, per_user=0
    ): ...

    def logits(self, hidden_D, tokens_U=None): ...

    def init_beam_cache(self, batch: int, beams: int, slots: int): ...


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
    cache: BeamCache  # the tokens before each one's edge
    calls: jax.Array


def prepare_trie(trie: ItemTrie, config: SearchConfig) -> DeviceTrie:
    """The trie (from `ItemTrie.build`) in the form that a search of this kind walks."""
    walked = trie.compress() if config.compress else trie
    return DeviceTrie.of(walked, score_edges=config.vocabulary)


def run_prompts(
    model: LanguageModel,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    after_BxK: jax.Array | None = None,
    lower: object = None,
):
    """Reads prompts, and what stands behind them.

    Args:
      after_BxK: int32, behind how many further tokens a state is wanted too.
      lower: what the model's prefill takes of layers that have run.

    Returns:
      (states [B, 1 + K, D] at each prompt's last token and `after` it, keys and values).
    """
    place_BxK = jnp.zeros_like(lengths_B)[:, None]
    if after_BxK is not None:
        place_BxK = jnp.concatenate([place_BxK, after_BxK], axis=1)
    read_B = lengths_B + jnp.max(place_BxK, axis=1)
    hidden_BxSxD, prompt = model.prefill(tokens_BxS, read_B, lower=lower)
    index_BxK = lengths_B[:, None] - 1 + place_BxK
    return jnp.take_along_axis(hidden_BxSxD, index_BxK[:, :, None], axis=1), prompt


def search_from_prompt(
    model: LanguageModel,
    hidden_Bx1xD: jax.Array,
    prompt: object,
    prompt_lengths_B: jax.Array,
    cf_logits_BxI: jax.Array | None,
    trie: DeviceTrie,
    weights: ScoreWeights,
    *,
    config: SearchConfig,
    allowed_BxI: jax.Array | None = None,
    renormalise: bool = True,
) -> SearchResult:
    """Beam search after prompts that have run; one traceable program without a Python loop.

    Args:
      model: a Decoder (or anything with its four methods).
      hidden_Bx1xD, prompt: from `run_prompts`; prompt_lengths_B: int32.
      cf_logits_BxI: float CF logits of all items for each user; None switches guidance off.
      trie: from `prepare_trie`.
      weights: see ScoreWeights.
      allowed_BxI: bool, leaves items out: what is found is what a trie of the allowed items alone
        would give, whatever the score; a title is a candidate while one of its items is allowed.
      renormalise: False keeps the scores of the whole catalogue (and of its CF model) then.

    Returns:
      The `config.beams` best sequences of each user, all different; fewer if the catalogue has
      fewer (or the search found fewer). Equal scores keep the order in which they were found.
    """
    mass_BxN, alive_BxN = None, None
    if allowed_BxI is not None:
        present_BxI = jnp.where(allowed_BxI, 0.0, -jnp.inf)
        alive_BxN = node_log_mass(present_BxI, trie) > -jnp.inf
    if cf_logits_BxI is not None:
        if allowed_BxI is not None and renormalise:
            cf_logits_BxI = jnp.where(allowed_BxI, cf_logits_BxI, -jnp.inf)
        mass_BxN = node_log_mass(cf_logits_BxI, trie, weights.beta)
    batch, beams = hidden_Bx1xD.shape[0], config.beams

    def expand(state: _State, scores: EdgeScores, node, total, children: int):
        """Goes on from the hypotheses at `node`, whose edges have been read, to their children."""
        child_BxMxC, log_p_BxMxC = _child_log_probs(
            scores, node, mass_BxN, alive_BxN, trie, weights, children,
            masked_softmax=not config.vocabulary, renormalise=renormalise,
        )  # fmt: skip
        total_BxMxC = total[:, :, None] + log_p_BxMxC
        ends_BxMxC = trie.run_length[child_BxMxC] == 0
        if config.compress and config.vocabulary:  # titles that have just been read to their end
            at_end_BxM = jnp.where(trie.leaf[node] >= 0, total, -jnp.inf)
            child_BxMxC = _append(child_BxMxC, node)
            total_BxMxC = _append(total_BxMxC, at_end_BxM)
            ends_BxMxC = _append(ends_BxMxC, jnp.ones_like(node, bool))
        per_beam = child_BxMxC.shape[2]
        candidates = (x.reshape(batch, -1) for x in (child_BxMxC, total_BxMxC, ends_BxMxC))
        state, chosen_BxM = _select(state, *candidates, trie, weights, config)
        return state, chosen_BxM // per_beam

    bounds = _children_bounds(trie.sizes.inner_children)

    def step(state: _State) -> _State:
        scores, cache, calls = run_edges(
            model, state.node_BxM, prompt, prompt_lengths_B, state.cache, trie,
            weights.temperature, vocabulary=config.vocabulary,
            edge_chunk=min(config.edge_chunk, trie.sizes.longest_run),
        )  # fmt: skip
        node, total = state.node_BxM, state.total_BxM + scores.forced_BxM
        # The root stands for an empty slot.
        most = jnp.max(jnp.where(node > 0, trie.child_count[node], 0))
        small = state._replace(cache=(), calls=())
        branches = [partial(expand, children=bound) for bound in bounds]
        small, beam_BxM = jax.lax.switch(
            jnp.searchsorted(jnp.array(bounds), most), branches, small, scores, node, total
        )
        return small._replace(cache=gather_beams(cache, beam_BxM), calls=state.calls + calls)

    sizes = _pool_sizes(beams, trie.sizes.beam_reads)
    nothing_BxM = jnp.full((batch, beams), -jnp.inf)
    start = _State(
        node_BxM=jnp.zeros((batch, beams), jnp.int32),
        total_BxM=nothing_BxM,
        leaf_BxM=jnp.full((batch, beams), -1, jnp.int32),
        score_BxM=nothing_BxM,
        cache=model.init_beam_cache(batch, beams, sizes[0]),
        calls=jnp.int32(0),
    )
    scores = scores_of_hidden(
        model, hidden_Bx1xD, trie, weights.temperature, vocabulary=config.vocabulary
    )
    root_Bx1 = jnp.zeros((batch, 1), jnp.int32)
    state, _ = expand(start, scores, root_Bx1, jnp.zeros((batch, 1)), trie.sizes.root_children)

    def search_on(state: _State, sizes: list[int]) -> SearchResult:
        """To the end; with larger pools, if it comes to that."""
        size, *larger = sizes

        def goes_on(state):
            return jnp.any(state.total_BxM > -jnp.inf)

        def fits(state):
            needed_B = state.cache.paths.used_B + jnp.sum(trie.run_length[state.node_BxM], axis=1)
            return jnp.all(needed_B <= size)

        state = jax.lax.while_loop(lambda s: goes_on(s) & fits(s), step, state)
        result = SearchResult(state.leaf_BxM, state.score_BxM, state.calls)
        if not larger:
            return result

        def enlarged():
            return search_on(state._replace(cache=grow_cache(state.cache, larger[0])), larger)

        return jax.lax.cond(goes_on(state), enlarged, lambda: result)

    return search_on(state, sizes)


def _pool_sizes(beams: int, most_reads: int) -> list[int]:
    """Slots of a user's pool: few as long as few are taken, since every query looks at all.

    A size is another copy of the search to compile, and has to save half of the slots for that.
    """
    largest = beams * most_reads
    sizes = (beams * _FIRST_READS << 2 * n for n in range(16))
    return [*(size for size in sizes if 2 * size <= largest), largest]


def _children_bounds(largest: int) -> list[int]:
    """Static numbers of children; a step takes the smallest that holds those of its nodes."""
    bounds = [bound for bound in (_FIRST_BOUND << 3 * n for n in range(8)) if bound < largest]
    return [*bounds, largest]


def _append(values_BxMxC: jax.Array, one_BxM: jax.Array) -> jax.Array:
    return jnp.concatenate([values_BxMxC, one_BxM[:, :, None]], axis=2)


def _child_log_probs(
    scores, node_BxM, mass_BxN, alive_BxN, trie, weights, children, *, masked_softmax, renormalise
):
    """(child node ids, log-probabilities of the step to them) [B, M, C]; -inf: no such child."""
    child_BxMxC, valid_BxMxC = trie.children(node_BxM, children)
    counted_BxMxC = valid_BxMxC
    if alive_BxN is not None:
        valid_BxMxC &= _per_user(alive_BxN, child_BxMxC)
        if renormalise:
            counted_BxMxC = valid_BxMxC
    index_BxMxC = trie.choice_index[child_BxMxC]
    logit_BxMxC = jnp.take_along_axis(scores.choice_BxMxU, index_BxMxC, axis=-1)
    norm_BxM = scores.norm_BxM
    if masked_softmax:
        norm_BxM = jax.nn.logsumexp(jnp.where(counted_BxMxC, logit_BxMxC, -jnp.inf), axis=-1)
    log_p_BxMxC = logit_BxMxC - norm_BxM[:, :, None]
    if mass_BxN is not None:
        child_mass = _per_user(mass_BxN, child_BxMxC)
        node_mass = _per_user(mass_BxN, node_BxM)
        log_cf_BxMxC = jnp.minimum(child_mass - node_mass[:, :, None], 0.0)
        log_p_BxMxC += jnp.where(weights.guidance > 0, weights.guidance * log_cf_BxMxC, 0.0)
    # A log-probability above 0 can only be rounding; the pruning bound relies on there being none.
    return child_BxMxC, jnp.where(valid_BxMxC, jnp.minimum(log_p_BxMxC, 0.0), -jnp.inf)


def _per_user(values_BxN: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, ...]] with the shape of index."""
    flat = jnp.take_along_axis(values_BxN, index.reshape(index.shape[0], -1), axis=1)
    return flat.reshape(index.shape)


def _select(state, child_BxX, total_BxX, ends_BxX, trie, weights, config):
    """Merges finished candidates into the result and keeps the best unfinished ones.

    ends_BxX: whether nothing is left to be read of the edge into the candidate.

    Returns:
      (state, index of the candidate in each unfinished slot [B, M]).
    """
    beams = config.beams
    penalty = weights.length_penalty
    leaf_BxX = trie.leaf[child_BxX]
    done_BxX = (leaf_BxX >= 0) & ends_BxX
    finished_BxX = done_BxX
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
    total_BxX = jnp.where(done_BxX, -jnp.inf, total_BxX)
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
