"""Beam search over the item trie: every result is an item of the catalogue.

Two score conventions. 'after_softmax' takes the log-softmax over the whole vocabulary and then
masks (as the published evaluation does). 'before_softmax' masks and then takes the log-softmax over
the allowed children (consistent with MSL, arXiv 2504.04178): a forced token has log-probability 0,
so a title is scored by its decisions and is never read to its end.

The search walks the compressed trie, one decision per step; `advance_beams` reads the forced tokens
after a decision in as few calls of the LLM as possible. Only 'after_softmax' with the rules of
'huggingface' goes token by token: there a hypothesis can be dropped in the middle of an edge.

Guidance adds lambda * log p_cf(token | prefix) (the Collaborative Tokenizer's distribution).

Axes: core/__init__.py; the rows of a batch are users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.core.collaborative_tokenizer import node_log_mass
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.decoding.advance_beams import EdgeReader, EdgeScores, Prompts
from tca4rec_jax.decoding.search_sizes import children_bounds, pool_capacities
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import BeamCache, gather_beams, grow_cache
from tca4rec_jax.ranges import Count, NotNegative, Temperature, check_fields


@dataclass(frozen=True)
class SearchConfig:
    """What a search looks for and how it scores; hashable, a static argument of jit.

    Attributes:
      beams: unfinished hypotheses kept per user, and the length of the result.
      mask: the children's mask comes 'before_softmax' or 'after_softmax', see the module.
      rules: 'exact' accepts every finished hypothesis and ends when no unfinished one can reach the
        result any more; 'huggingface' is what the published evaluation ran: a hypothesis may finish
        only from among the best `beams` candidates of its step, and the search for a user ends when
        the best unfinished score over its *present* length is no better than the worst kept.
      edge_chunk: most tokens of one edge that a call of the LLM reads (compressed trie only).
      find: a list is found by 'beams' over the trie, or by 'grounding': free text, then the titles
        nearest to it (BIGRec).
      grounding_beams: unfinished hypotheses of a free text.
      grounding_tokens: most tokens of one.
      renormalise: whether a search among allowed items scores as a catalogue of these items alone
        would; False keeps the scores of the whole catalogue (and of its CF model).

    Raises UserError for a value outside these.
    """

    beams: Count = 10
    mask: Literal["before_softmax", "after_softmax"] = "before_softmax"
    rules: Literal["exact", "huggingface"] = "exact"
    edge_chunk: Count = 8
    find: Literal["beams", "grounding"] = "beams"
    grounding_beams: Count = 4
    grounding_tokens: Count = 32
    renormalise: bool = True

    def __post_init__(self):
        check_fields(self, "decoding.")

    @property
    def compress(self) -> bool:
        """Whether the compressed trie is searched."""
        return self.mask == "before_softmax" or self.rules == "exact"

    @property
    def vocabulary(self) -> bool:
        """Whether the softmax is over the vocabulary, so that forced tokens count."""
        return self.mask == "after_softmax"

    def most_reads(self, trie: DeviceTrie) -> int:
        """The most tokens that the LLM reads after a prompt."""
        longest = trie.sizes.longest_path
        return max(longest, self.grounding_tokens) if self.find == "grounding" else longest

    def device_trie(self, trie: ItemTrie, item_shards: int = 1) -> DeviceTrie:
        """A trie from `ItemTrie.build` in the form that this search walks, on the host."""
        walked = trie.compress() if self.compress else trie
        return DeviceTrie.on_host(walked, item_shards=item_shards, score_edges=self.vocabulary)


class ScoreWeights(NamedTuple):
    """Numbers of the score that may change without recompilation (float scalars).

    The score of a finished hypothesis is
    sum over tokens (log P_LLM(token; logits / temperature) + guidance * log p_cf(token; beta))
    divided by (number of tokens, end token included) ** length_penalty.

    Attributes:
      guidance: weight of the Collaborative Tokenizer's distribution, lambda.
      beta: temperature of the CF logits.
      temperature: of the LLM's logits.
      length_penalty: exponent of the length; 0 compares sums of log-probabilities, 1 means.
    """

    guidance: NotNegative = 0.0
    beta: Temperature = 1.0
    temperature: Temperature = 1.0
    length_penalty: NotNegative = 0.0

    def check(self) -> "ScoreWeights":
        """Returns itself; raises UserError for a value out of range."""
        check_fields(self)
        return self


class SearchResult(NamedTuple):
    """The titles that a search found, best first."""

    leaves_BxM: jax.Array  # int32, -1 where there are no more
    scores_BxM: jax.Array  # float32, -inf where there are no more; NaN for a user of broken scores
    calls: jax.Array  # int32 scalar, calls of the LLM after the prompt


class _Beams(NamedTuple):
    """Unfinished hypotheses (the edges into their nodes are yet unread), and the best finished."""

    node_BxM: jax.Array
    total_BxM: jax.Array  # summed log-probabilities, -inf for an empty beam
    leaf_BxM: jax.Array  # finished hypotheses, best first
    score_BxM: jax.Array


class _State(NamedTuple):
    beams: _Beams
    cache: BeamCache  # the tokens before each unfinished hypothesis' edge
    calls: jax.Array
    broken_B: jax.Array  # whether a score that decides was NaN or infinite


def beam_search(
    model: Decoder,
    prompts: Prompts,
    trie: DeviceTrie,
    weights: ScoreWeights,
    config: SearchConfig,
    *,
    cf_logits_BxI: jax.Array | None = None,
    allowed_BxI: jax.Array | None = None,
    node_mass: Callable[..., jax.Array] = node_log_mass,
) -> SearchResult:
    """Beam search after prompts that have been read; traceable.

    Args:
      trie: from `config.device_trie`.
      cf_logits_BxI: float CF logits of all items for each user; None switches guidance off.
      allowed_BxI: bool, leaves items out: the result is that of a trie of the allowed items alone,
        whatever the score; a title is a candidate while one of its items is allowed.
      node_mass: makes masses of CF logits as `node_log_mass`; for nodes after the last they may be
        anything.

    Returns up to `config.beams` titles of each user, the best that were found, all different. Equal
    scores keep the order in which they were found.
    """
    log_mass_BxN, alive_BxN = None, None
    if allowed_BxI is not None:
        alive_BxN = node_mass(jnp.where(allowed_BxI, 0.0, -jnp.inf), trie, 1.0) > -jnp.inf
    if cf_logits_BxI is not None:
        if allowed_BxI is not None and config.renormalise:
            cf_logits_BxI = jnp.where(allowed_BxI, cf_logits_BxI, -jnp.inf)
        log_mass_BxN = node_mass(cf_logits_BxI, trie, weights.beta)
    edge_chunk = min(config.edge_chunk, trie.sizes.longest_run)
    reader = EdgeReader(model, prompts, trie, weights.temperature, config.vocabulary, edge_chunk)
    return _Search(reader, weights, config, log_mass_BxN, alive_BxN).run()


@dataclass(frozen=True)
class _Search:
    """One search of a batch; what stays the same over its steps."""

    reader: EdgeReader
    weights: ScoreWeights
    config: SearchConfig
    log_mass_BxN: jax.Array | None  # log sum exp(CF logits / beta) of the items below each node
    alive_BxN: jax.Array | None  # whether an allowed item is below

    @property
    def trie(self) -> DeviceTrie:
        return self.reader.trie

    def run(self) -> SearchResult:
        batch, beams = shape = self.reader.prompts.length_B.shape[0], self.config.beams
        sizes = self.trie.sizes
        capacities = pool_capacities(beams, sizes.beam_reads)
        root_BxM, empty_BxM = jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf)
        nothing = _Beams(root_BxM, empty_BxM, jnp.full_like(root_BxM, -1), empty_BxM)
        scores, zero_Bx1 = self.reader.after_prompts(), jnp.zeros((batch, 1))
        node_Bx1 = root_BxM[:, :1]
        first, _, broken_B = self._expand(sizes.root_children, nothing, scores, node_Bx1, zero_Bx1)
        cache = self.reader.model.init_beam_cache(batch, beams, capacities[0])
        return self._run_from(_State(first, cache, jnp.int32(0), broken_B), capacities)

    def _run_from(self, state: _State, capacities: list[int]) -> SearchResult:
        """To the end; a pool that runs out of slots grows to the next capacity."""
        capacity, *larger = capacities

        def unfinished(state: _State):
            return jnp.any(state.beams.total_BxM > -jnp.inf)

        def fits(state: _State):
            run_BxM = self.trie.run_length[state.beams.node_BxM]
            return jnp.all(state.cache.paths.used_B + jnp.sum(run_BxM, axis=1) <= capacity)

        state = jax.lax.while_loop(lambda s: unfinished(s) & fits(s), self._step, state)
        scores_BxM = jnp.where(state.broken_B[:, None], jnp.nan, state.beams.score_BxM)
        result = SearchResult(state.beams.leaf_BxM, scores_BxM, state.calls)
        if not larger:
            return result

        def grown():
            return self._run_from(state._replace(cache=grow_cache(state.cache, larger[0])), larger)

        return jax.lax.cond(unfinished(state), grown, lambda: result)

    def _step(self, state: _State) -> _State:
        """Reads the edges of the unfinished hypotheses and goes on to their nodes' children."""
        node, cache = state.beams.node_BxM, state.cache
        scores, cache, calls = self.reader.advance(node, cache)
        total = state.beams.total_BxM + scores.forced_BxM
        # The root stands for an empty beam.
        most = jnp.max(jnp.where(node > 0, self.trie.child_count[node], 0))
        bounds = children_bounds(self.trie.sizes.inner_children)
        branches = [partial(self._expand, bound) for bound in bounds]
        smallest = jnp.sum(jnp.array(bounds) < most)
        args = state.beams, scores, node, total
        beams, beam_BxM, broken_B = jax.lax.switch(smallest, branches, *args)
        broken_B |= state.broken_B | ~jnp.all(jnp.isfinite(scores.forced_BxM), axis=1)
        return _State(beams, gather_beams(cache, beam_BxM), state.calls + calls, broken_B)

    def _expand(
        self, children: int, beams: _Beams, scores: EdgeScores, node: jax.Array, total: jax.Array
    ) -> tuple[_Beams, jax.Array, jax.Array]:
        """The best hypotheses among the children (at most `children` each) of nodes, edges read.

        Returns (beams, int32 [B, M]: the beam that each unfinished hypothesis goes on from, bool
        [B]: whether the log-probability of a child is not finite).
        """
        child_BxMxC, log_p_BxMxC, broken_B = self._child_log_probs(children, scores, node)
        ends_BxMxC = self.trie.run_length[child_BxMxC] == 0
        candidates = [child_BxMxC, total[:, :, None] + log_p_BxMxC, ends_BxMxC]
        if self.config.compress and self.config.vocabulary:  # titles just read to their end
            at_end_BxM = jnp.where(self.trie.leaf[node] >= 0, total, -jnp.inf)
            more = (x[:, :, None] for x in (node, at_end_BxM, jnp.ones_like(node, bool)))
            candidates = [jnp.concatenate(x, axis=2) for x in zip(candidates, more, strict=True)]
        flat = (x.reshape(node.shape[0], -1) for x in candidates)
        beams, chosen_BxM = self._select(beams, *flat)
        return beams, chosen_BxM // candidates[0].shape[2], broken_B

    def _child_log_probs(
        self, children: int, scores: EdgeScores, node_BxM: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(child ids, log-probabilities of the step to them) [B, M, C]; -inf: no such child.

        The third, bool [B], says whether that of a child is not finite.
        """
        trie = self.trie
        child_BxMxC, valid_BxMxC = trie.children(node_BxM, children)
        counted_BxMxC = valid_BxMxC
        if self.alive_BxN is not None:
            valid_BxMxC &= _per_user(self.alive_BxN, child_BxMxC)
            if self.config.renormalise:
                counted_BxMxC = valid_BxMxC
        index_BxMxC = trie.choice_index[child_BxMxC]
        logit_BxMxC = jnp.take_along_axis(scores.choice_BxMxU, index_BxMxC, axis=-1)
        norm_BxM = scores.norm_BxM
        if not self.config.vocabulary:
            counted_logits = jnp.where(counted_BxMxC, logit_BxMxC, -jnp.inf)
            norm_BxM = jax.nn.logsumexp(counted_logits, axis=-1)
        log_p_BxMxC = logit_BxMxC - norm_BxM[:, :, None]
        if self.log_mass_BxN is not None:
            guidance, node_mass_BxM = self.weights.guidance, _per_user(self.log_mass_BxN, node_BxM)
            log_cf_BxMxC = _per_user(self.log_mass_BxN, child_BxMxC) - node_mass_BxM[:, :, None]
            log_cf_BxMxC = jnp.minimum(log_cf_BxMxC, 0.0)
            log_p_BxMxC += jnp.where(guidance > 0, guidance * log_cf_BxMxC, 0.0)
        broken_B = jnp.any(valid_BxMxC & ~jnp.isfinite(log_p_BxMxC), axis=(1, 2))
        # A log-probability above 0 is rounding; the bound of `_select` relies on there being none.
        log_p_BxMxC = jnp.where(valid_BxMxC, jnp.minimum(log_p_BxMxC, 0.0), -jnp.inf)
        return child_BxMxC, log_p_BxMxC, broken_B

    def _select(
        self, beams: _Beams, child_BxX: jax.Array, total_BxX: jax.Array, ends_BxX: jax.Array
    ) -> tuple[_Beams, jax.Array]:
        """Merges finished candidates into the result and keeps the best unfinished ones.

        `ends` says whether the edge into the candidate has no unread tokens. Returns (beams, int32
        [B, M]: the candidate that each unfinished hypothesis was).
        """
        trie, count = self.trie, self.config.beams
        penalty, huggingface = self.weights.length_penalty, self.config.rules == "huggingface"
        leaf_BxX = trie.leaf[child_BxX]
        finished_BxX = done_BxX = (leaf_BxX >= 0) & ends_BxX
        score_BxX = total_BxX / trie.depth[child_BxX].astype(jnp.float32) ** penalty
        if huggingface:
            best_BxM, _ = _top(total_BxX, count)
            finished_BxX = done_BxX & (total_BxX >= best_BxM[:, -1:])
        score_BxX = jnp.where(finished_BxX, score_BxX, -jnp.inf)
        kept_score_BxM, kept = _top(jnp.concatenate([beams.score_BxM, score_BxX], axis=1), count)
        leaves = jnp.concatenate([beams.leaf_BxM, leaf_BxX], axis=1)
        kept_leaf_BxM = jnp.take_along_axis(leaves, kept, axis=1)
        kept_leaf_BxM = jnp.where(kept_score_BxM > -jnp.inf, kept_leaf_BxM, -1)

        # Totals only fall (every step adds at most 0), so a hypothesis can at best keep its total
        # and end with the longest sequence below it.
        worst_Bx1 = kept_score_BxM[:, -1:]
        total_BxX = jnp.where(done_BxX, -jnp.inf, total_BxX)
        if not huggingface:
            bound_BxX = total_BxX / trie.longest[child_BxX].astype(jnp.float32) ** penalty
            total_BxX = jnp.where(bound_BxX > worst_Bx1, total_BxX, -jnp.inf)
        live_BxM, chosen_BxM = _top(total_BxX, count)
        node_BxM = jnp.take_along_axis(child_BxX, chosen_BxM, axis=1)
        if huggingface:
            depth_Bx1 = trie.depth[node_BxM[:, :1]].astype(jnp.float32)
            goes_on_Bx1 = live_BxM[:, :1] / depth_Bx1**penalty > worst_Bx1
            live_BxM = jnp.where(goes_on_Bx1, live_BxM, -jnp.inf)
        node_BxM = jnp.where(live_BxM > -jnp.inf, node_BxM, 0)
        return _Beams(node_BxM, live_BxM, kept_leaf_BxM, kept_score_BxM), chosen_BxM


def _per_user(values_BxN: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, ...]] with the shape of index: one gather per user."""
    flat = jnp.take_along_axis(values_BxN, index.reshape(index.shape[0], -1), axis=1)
    return flat.reshape(index.shape)


def _top(values_BxX: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values and their indices; -inf and index 0 where X is smaller."""
    available = min(count, values_BxX.shape[1])
    top, index = jax.lax.top_k(values_BxX, available)
    missing = ((0, 0), (0, count - available))
    return jnp.pad(top, missing, constant_values=-jnp.inf), jnp.pad(index, missing)
