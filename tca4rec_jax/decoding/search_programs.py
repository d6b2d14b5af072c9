"""The programs of a batched search: lower layers, prompts, and the search that goes on from them.

Each runs on shares of a batch. Users don't depend on one another, so each device along 'data' (or
each group of devices that share a copy of the model) runs a program of its own: nothing is
communicated between them, and one whose users are done does not wait for the others. Inside a group
the compiler splits the work along the weights, which stay where they are: a step's few tokens are
lighter than they.

Axis letters: B rows of a batch, S prompt tokens, M beams, I items, T temperatures, D model,
L layers, K kv heads, H head dim.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.decoding.beam_search import (
    ScoreWeights,
    SearchConfig,
    run_prompts,
    search_from_prompt,
)
from tca4rec_jax.decoding.likelihood import TargetTitles, title_nll
from tca4rec_jax.distributed.data_parallel import RowParallel
from tca4rec_jax.distributed.sharding import row_sharding, sharding_of
from tca4rec_jax.llm.decoder import LowerLayers
from tca4rec_jax.llm.kv_cache import KVCache


class Prompts(NamedTuple):
    """Prompts that have run: what a search goes on from."""

    hidden: jax.Array  # [B, 1, D], at each one's last token
    kv: KVCache  # [L, B, room, K, H]


@partial(jax.jit, static_argnames=("mesh", "graph", "layers"))
def lower_layers(
    state: nnx.State, tokens_BxS: jax.Array, *, mesh: Mesh, graph: nnx.GraphDef, layers: int
) -> LowerLayers:
    """The prompts after a decoder's first layers."""
    on_rows = RowParallel(mesh, "prompts")
    run = on_rows(
        lambda state, tokens: nnx.merge(graph, state).prefill_lower(tokens, layers),
        in_specs=(PartitionSpec(), on_rows.rows),
        out_specs=_of_layers(on_rows, LowerLayers),
    )
    return run(state, tokens_BxS)


def prompts_sharding(mesh: Mesh, prompts: Prompts) -> Prompts:
    """Where prompts of these shapes live: with their rows, keys and values with their heads."""
    axes = (None, "prompts", None, "kv_heads", None)
    of_kv = jax.tree.map(lambda values: sharding_of(mesh, axes, values.shape), prompts.kv)
    return Prompts(row_sharding(mesh, "prompts"), of_kv)


def _of_layers(on_rows: RowParallel, states_and_kv):
    """Specs of states [B, ...] with keys and values [L, B, ...]."""
    return states_and_kv(on_rows.rows, PartitionSpec(None, *on_rows.rows))


@partial(jax.jit, static_argnames=("mesh", "graph", "config", "room"))
def read_prompts(
    state: nnx.State,
    lower: LowerLayers | None,
    tokens_BxS: jax.Array,
    lengths_B: jax.Array,
    target_B: TargetTitles | None,
    trie: DeviceTrie,
    temperature_T: jax.Array,
    *,
    mesh: Mesh,
    graph: nnx.GraphDef,
    config: SearchConfig,
    room: int,
) -> tuple[Prompts, jax.Array | None]:
    """(the prompts as `search_batch` takes them, NLL float32 [B, T] of their targets).

    Behind a prompt stands what `target_titles` says that is read of its target. Without targets
    there is no likelihood (None). From `lower` on if the lower layers have read all of that. Keys
    and values get room for so many tokens, so that one search goes on from prompts of every length
    (it looks at no more than these).
    """

    def on_one_group(state, lower, tokens, lengths, target, trie, temperature_T):
        decoder = nnx.merge(graph, state)
        after_BxK = None if target is None else target.place_RxK
        states_BxKxD, kv = run_prompts(decoder, tokens, lengths, after_BxK, lower)
        nll_BxT = None
        if target is not None:
            nll_BxT = title_nll(
                decoder, states_BxKxD[:, 1:], target, trie, temperature_T,
                masked_softmax=not config.vocabulary,
            )  # fmt: skip
        missing = [(0, 0), (0, 0), (0, room - tokens.shape[1]), (0, 0), (0, 0)]
        kv = jax.tree.map(lambda values: jnp.pad(values, missing), kv)
        return Prompts(states_BxKxD[:, :1], kv), nll_BxT

    on_rows, everywhere = RowParallel(mesh, "prompts"), PartitionSpec()
    sharded = on_rows(
        on_one_group,
        in_specs=(
            everywhere,
            lower and _of_layers(on_rows, LowerLayers),
            *[on_rows.rows] * 3,
            *[everywhere] * 2,
        ),
        out_specs=(_of_layers(on_rows, Prompts), on_rows.rows),
    )
    prompts, nll_BxT = sharded(state, lower, tokens_BxS, lengths_B, target_B, trie, temperature_T)
    return jax.lax.with_sharding_constraint(prompts, prompts_sharding(mesh, prompts)), nll_BxT


@partial(jax.jit, static_argnames=("mesh", "graph", "config", "renormalise"))
def search_batch(
    state: nnx.State,
    prompts: Prompts,
    lengths_B: jax.Array,
    cf_logits_BxI: jax.Array | None,
    allowed_BxI: jax.Array | None,
    trie: DeviceTrie,
    weights: ScoreWeights,
    *,
    mesh: Mesh,
    graph: nnx.GraphDef,
    config: SearchConfig,
    renormalise: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Beam search after prompts: (leaves, scores) [B, M]; arguments as of `search_from_prompt`."""

    def on_one_group(state, prompts, lengths, cf_logits, allowed, trie, weights):
        result = search_from_prompt(
            nnx.merge(graph, state), *prompts, lengths, cf_logits, trie, weights,
            config=config, allowed_BxI=allowed, renormalise=renormalise,
        )  # fmt: skip
        return result.leaves, result.scores

    on_rows, everywhere = RowParallel(mesh, "prompts"), PartitionSpec()
    sharded = on_rows(
        on_one_group,
        in_specs=(
            everywhere,
            _of_layers(on_rows, Prompts),
            *[on_rows.rows] * 3,
            *[everywhere] * 2,
        ),
        out_specs=on_rows.rows,
    )
    return sharded(state, prompts, lengths_B, cf_logits_BxI, allowed_BxI, trie, weights)
