"""The jitted programs of a search: the shared prefix of layers, prompts, and beam search.

Each runs on shares of a batch. Users are independent, so each device along 'data' (or each group of
devices that share a copy of the model) runs a program of its own: groups do not communicate, and a
group whose users are done does not wait for the others. Inside a group the compiler splits the work
along the weights, which stay where they are: the few tokens of a step are lighter.

Axes: core/__init__.py; here K are scored tokens, T temperatures, Kv key-value heads, H head dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.decoding.advance_beams import Prompts
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, beam_search
from tca4rec_jax.decoding.likelihood import ScoredTokens, title_nll
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.sharding import RULES, row_sharding, sharding_of
from tca4rec_jax.llm.decoder import Decoder, PrefixStates

_EVERYWHERE = PartitionSpec()
_ROWS = RULES.spec(("prompts",))
_KV = PartitionSpec(None, *_ROWS)
_PROMPTS, _PREFIX = Prompts._make([_ROWS, _KV, _ROWS]), PrefixStates._make([_ROWS, _KV])


@dataclass(frozen=True)
class SearchProgram:
    """What the programs are compiled for; hashable, a static argument of jit."""

    mesh: Mesh
    graph: nnx.GraphDef  # of the decoder, whose state is an argument
    config: SearchConfig

    @property
    def on_rows(self) -> DataParallel:
        """Runs a program on every device's own prompts."""
        return DataParallel(self.mesh, "prompts")


class Texts(NamedTuple):
    """What the LLM reads of a batch before the search: prompts, and titles to score after them."""

    tokens_BxS: Array  # int32, right-padded
    length_B: Array  # int32, of the prompts alone
    scored: ScoredTokens | None = None  # from `scored_titles`


def prompts_sharding(mesh: Mesh, prompts: Prompts) -> Prompts:
    """Where prompts of these shapes live: with their rows, and keys and values with their heads."""
    axes = (None, "prompts", None, "kv_heads", None)
    of_kv = jax.tree.map(lambda values: sharding_of(mesh, axes, values.shape), prompts.kv)
    return jax.tree.map(lambda _: row_sharding(mesh, "prompts"), prompts)._replace(kv=of_kv)


@partial(jax.jit, static_argnames=("program", "layers"))
def read_prefix(
    state: nnx.State, tokens_BxS: jax.Array, *, program: SearchProgram, layers: int
) -> PrefixStates:
    """The texts of a batch after a decoder's first layers."""
    sharded = program.on_rows(
        lambda state, tokens: nnx.merge(program.graph, state).prefill_prefix(tokens, layers),
        in_specs=(_EVERYWHERE, _ROWS),
        out_specs=_PREFIX,
    )
    return sharded(state, tokens_BxS)


@partial(jax.jit, static_argnames=("program", "capacity"))
def read_prompts(
    state: nnx.State,
    texts: Texts,
    prefix: PrefixStates | None,
    trie: DeviceTrie,
    temperature_T: jax.Array,
    *,
    program: SearchProgram,
    capacity: int,
) -> tuple[Prompts, jax.Array]:
    """Reads the texts of a batch.

    Args:
      prefix: the texts after the first layers, from `read_prefix`, if these have run.
      temperature_T: float32, of the likelihood.
      capacity: keys and values get room for so many tokens, so that one compiled search goes on
        from prompts of every length. The search looks at the prompts' own tokens only.

    Returns:
      (prompts; -log P float32 [B, T] of the scored titles, [B, 0] without titles).
    """

    def on_one_group(state, texts, prefix, trie, temperature_T):
        model, scored = nnx.merge(program.graph, state), texts.scored
        after_BxK = None if scored is None else scored.position
        read = texts.tokens_BxS, texts.length_B, after_BxK, prefix
        states_BxKxD, prompts = prefill_prompts(model, *read)
        nll_BxT = jnp.zeros((texts.length_B.shape[0], 0))
        if scored is not None:
            nll_BxT = title_nll(model, states_BxKxD[:, 1:], scored, trie, temperature_T)
        missing = [(0, 0), (0, 0), (0, capacity - texts.tokens_BxS.shape[1]), (0, 0), (0, 0)]
        kv = jax.tree.map(lambda values: jnp.pad(values, missing), prompts.kv)
        return prompts._replace(kv=kv), nll_BxT

    sharded = program.on_rows(
        on_one_group,
        in_specs=(_EVERYWHERE, _ROWS, prefix and _PREFIX, _EVERYWHERE, _EVERYWHERE),
        out_specs=(_PROMPTS, _ROWS),
    )
    prompts, nll_BxT = sharded(state, texts, prefix, trie, temperature_T)
    shardings = prompts_sharding(program.mesh, prompts)
    return jax.lax.with_sharding_constraint(prompts, shardings), nll_BxT


def prefill_prompts(
    model: Decoder,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    after_BxK: jax.Array | None = None,
    prefix: PrefixStates | None = None,
) -> tuple[jax.Array, Prompts]:
    """Reads prompts of `length_B` tokens and the tokens after them; traceable.

    Returns:
      (states [B, 1 + K, D]: at each prompt's last token, and `after` so many more; the prompts).
    """
    after_BxA = jnp.zeros_like(length_B)[:, None]
    if after_BxK is not None:
        after_BxA = jnp.concatenate([after_BxA, after_BxK], axis=1)
    read_B = length_B + jnp.max(after_BxA, axis=1)
    hidden_BxSxD, kv = model.prefill(tokens_BxS, read_B, prefix=prefix)
    index_BxA = length_B[:, None] - 1 + after_BxA
    states_BxAxD = jnp.take_along_axis(hidden_BxSxD, index_BxA[:, :, None], axis=1)
    return states_BxAxD, Prompts(states_BxAxD[:, :1], kv, length_B)


class Users(NamedTuple):
    """What a search knows of a batch's users besides their prompts."""

    cf_BxD: Array | None = None  # float32 vectors (or logits [B, I]); None: no guidance
    allowed_BxI: Array | None = None  # bool; None allows all items


@partial(jax.jit, static_argnames="program")
def search_batch(
    state: nnx.State,
    prompts: Prompts,
    users: Users,
    cf_items: CFItems,
    trie: DeviceTrie,
    weights: ScoreWeights,
    *,
    program: SearchProgram,
) -> tuple[jax.Array, jax.Array]:
    """`beam_search` on every group of devices: (leaves int32, scores float32) [B, M]."""

    def on_one_group(state, prompts, users, cf_items, trie, weights):
        cf_BxI = None if users.cf_BxD is None else cf_logits(users.cf_BxD, cf_items)
        result = beam_search(
            nnx.merge(program.graph, state),
            prompts,
            trie,
            weights,
            program.config,
            cf_logits_BxI=cf_BxI,
            allowed_BxI=users.allowed_BxI,
        )
        return result.leaves_BxM, result.scores_BxM

    specs = (_EVERYWHERE, _PROMPTS, _ROWS, *[_EVERYWHERE] * 3)
    sharded = program.on_rows(on_one_group, in_specs=specs, out_specs=_ROWS)
    return sharded(state, prompts, users, cf_items, trie, weights)
