"""The jitted programs of a search: the frozen prefix of layers, prompts, and beam search.

Each runs on shares of a batch. Users are independent, so each device along 'data' (or each group of
devices that share a copy of the model) runs a program of its own: groups do not communicate, and a
group whose users are done does not wait for the others. Inside a group the compiler splits the work
along the weights, which stay where they are: the few tokens of a step are lighter.

Axes: core/__init__.py; here K are scored tokens, T temperatures, Kv key-value heads, H head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.decoding.advance_beams import Prompts
from tca4rec_jax.decoding.beam_search import ScoreWeights, SearchConfig, beam_search
from tca4rec_jax.decoding.grounding import TitleIndex, ground
from tca4rec_jax.decoding.likelihood import ScoredTokens, title_nll
from tca4rec_jax.decoding.search_sizes import rows_at_once
from tca4rec_jax.decoding.title_paths import TitlePaths, TitleScores, read_titles
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.sharded_search import sharded_log_mass
from tca4rec_jax.distributed.sharding import RULES, row_sharding, sharding_of
from tca4rec_jax.llm.decoder import Decoder, PrefixStates
from tca4rec_jax.llm.projector import SoftTokens

_EVERYWHERE = PartitionSpec()
_ROWS = RULES.spec(("prompts",))


@dataclass(frozen=True)
class SearchProgram:
    """What the programs are compiled for; hashable, a static argument of jit."""

    mesh: Mesh
    graph: nnx.GraphDef  # of the decoder, whose state is an argument
    config: SearchConfig

    def run(self, function: Callable, args: tuple, in_specs, out_specs):
        """function(decoder, ...) on every device's own prompts, for args (its state, ...)."""

        def on_one_group(state, *args):
            return function(nnx.merge(self.graph, state), *args)

        specs = (_EVERYWHERE, *in_specs)
        return self.on_prompts(on_one_group, specs, out_specs)(*args)

    @property
    def on_prompts(self) -> DataParallel:
        """The devices, each with its own prompts."""
        return DataParallel(self.mesh, "prompts")


class TextBatch(NamedTuple):
    """What the LLM reads of a batch before the search: prompts, and titles to score after them."""

    tokens_BxS: Array  # int32, right-padded
    length_B: Array  # int32, of the prompts alone
    scored: ScoredTokens | None = None  # from `scored_titles`
    soft: SoftTokens | None = None  # in the prompts; for models with a projector


def prompts_sharding(mesh: Mesh, prompts: Prompts) -> Prompts:
    """Where prompts of these shapes live: with their rows, and keys and values with their heads."""
    axes = ("prompts", None, "kv_heads", None, None)
    of_kv = jax.tree.map(lambda values: sharding_of(mesh, axes, values.shape), prompts.kv)
    return jax.tree.map(lambda _: row_sharding(mesh, "prompts"), prompts)._replace(kv=of_kv)


@partial(jax.jit, static_argnames=("program", "layers"))
def read_prefix(
    state: nnx.State, tokens_BxS: jax.Array, *, program: SearchProgram, layers: int
) -> PrefixStates:
    """The texts of a batch after a decoder's first layers."""

    def read(model, tokens_BxS):
        return _in_groups(partial(model.prefill_prefix, layers=layers), tokens_BxS)

    return program.run(read, (state, tokens_BxS), (_ROWS,), _ROWS)


@partial(jax.jit, static_argnames=("program", "capacity"))
def read_prompts(
    state: nnx.State,
    texts: TextBatch,
    prefix: PrefixStates | None,
    trie: DeviceTrie,
    temperature_T: jax.Array,
    *,
    program: SearchProgram,
    capacity: int,
) -> tuple[Prompts, jax.Array]:
    """Reads the texts of a batch, after the frozen prefix if `read_prefix` has run it.

    Keys and values get room for `capacity` tokens, so that one compiled search goes on from prompts
    of every length; it looks at the prompts' own tokens only.

    Returns (prompts, -log P float32 [B, T] of the scored titles; [B, 0] without titles).
    """

    def read(model, texts, prefix, trie, temperature_T):
        def of_rows(rows):
            (tokens_BxS, length_B, scored, soft), prefix = rows
            after_BxK = None if scored is None else scored.position
            soft = soft if model.projector is not None else None
            args = tokens_BxS, length_B, after_BxK, prefix, soft
            states_BxKxD, prompts = prefill_prompts(model, *args)
            nll_BxT = jnp.zeros((length_B.shape[0], 0))
            if scored is not None:
                nll_BxT = title_nll(model, states_BxKxD[:, 1:], scored, trie, temperature_T)
            missing = [(0, 0)] * 3 + [(0, capacity - tokens_BxS.shape[1]), (0, 0)]
            kv = jax.tree.map(lambda values: jnp.pad(values, missing), prompts.kv)
            return prompts._replace(kv=kv), nll_BxT

        return _in_groups(of_rows, (texts, prefix))

    args = state, texts, prefix, trie, temperature_T
    specs = _ROWS, _ROWS, _EVERYWHERE, _EVERYWHERE
    prompts, nll_BxT = program.run(read, args, specs, _ROWS)
    shardings = prompts_sharding(program.mesh, prompts)
    return jax.lax.with_sharding_constraint(prompts, shardings), nll_BxT


def _in_groups(read: Callable[[Any], Any], texts: Any) -> Any:
    """read(texts), both trees of arrays [B, ...]; on a CPU `rows_at_once`, group after group."""
    batch, length = jax.tree.leaves(texts)[0].shape
    rows = rows_at_once(batch, length)

    def in_groups(texts):
        grouped = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), texts)
        found = jax.lax.map(read, grouped)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), found)

    if rows == batch:
        return read(texts)
    return jax.lax.platform_dependent(texts, cpu=in_groups, default=read)


def prefill_prompts(
    model: Decoder,
    tokens_BxS: jax.Array,
    length_B: jax.Array,
    after_BxK: jax.Array | None = None,
    prefix: PrefixStates | None = None,
    soft: SoftTokens | None = None,
) -> tuple[jax.Array, Prompts]:
    """Reads prompts of `length_B` tokens and the tokens after them; traceable.

    Returns (states [B, 1 + K, D] at each prompt's last token and `after` so many more, prompts).
    """
    after_BxA = jnp.zeros_like(length_B)[:, None]
    if after_BxK is not None:
        after_BxA = jnp.concatenate([after_BxA, after_BxK], axis=1)
    position_BxA = length_B[:, None] - 1 + after_BxA
    states_BxAxD, kv = model.prefill(tokens_BxS, position_BxA, soft=soft, prefix=prefix)
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
    titles: TitleIndex | None = None,
    *,
    program: SearchProgram,
) -> tuple[jax.Array, jax.Array]:
    """`beam_search`, or with an index of titles `ground`, on every group of devices.

    Returns (leaves int32, scores float32) [B, M].
    """

    def search(model, prompts, users, cf_items, trie, weights, titles):
        cf_BxI = None if users.cf_BxD is None else cf_logits(users.cf_BxD, cf_items)
        given = {"cf_logits_BxI": cf_BxI, "allowed_BxI": users.allowed_BxI}
        size = trie.item_order.shape[0]  # zeros: such items have no title
        given = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, size - x.shape[1]))), given)
        if titles is not None:
            return ground(model, prompts, titles, trie, weights, program.config, **given)
        node_mass = partial(sharded_log_mass, program.on_prompts)
        args = model, prompts, trie, weights, program.config
        result = beam_search(*args, **given, node_mass=node_mass)
        return result.leaves_BxM, result.scores_BxM

    args = state, prompts, users, cf_items, trie, weights, titles
    return program.run(search, args, (_ROWS, _ROWS, *[_EVERYWHERE] * 4), _ROWS)


@partial(jax.jit, static_argnames=("program", "slots"))
def read_titles_batch(
    state: nnx.State,
    prompts: Prompts,
    trie: DeviceTrie,
    temperature: float,
    paths: TitlePaths,
    *,
    program: SearchProgram,
    slots: int,
) -> TitleScores:
    """`read_titles` on every group of devices: the same titles after every prompt."""
    read = partial(read_titles, config=program.config, slots=slots)
    args = state, prompts, trie, temperature, paths
    return program.run(read, args, (_ROWS, *[_EVERYWHERE] * 3), _ROWS)
