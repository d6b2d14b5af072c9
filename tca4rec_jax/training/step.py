"""The training step: the decoder's loss on a batch, and one optimiser update of its adapters.

Axis letters: B batch, S sequence, T supervised positions, P supervised titles, K decisions,
D model or CF width, I items, N trie nodes, V vocabulary, C children.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.collaborative_tokenizer import (
    TrieArrays,
    TrieShape,
    child_log_probs,
    node_log_mass,
)
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.soft_ntp import Decisions, Loss, children_loss, vocabulary_loss
from tca4rec_jax.training.batches import Batch


class CFItems(NamedTuple):
    """The item side of a factorised CF store; None for a dense store."""

    table_IxD: jax.Array | None
    bias_I: jax.Array | None


class Temperatures(NamedTuple):
    """The objective's scalars, traced, so that they may follow a schedule."""

    alpha: jax.Array
    beta: jax.Array
    tau: jax.Array


class TrainState(NamedTuple):
    """What changes from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32, updates done
    adapters: nnx.State
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Of one step, float32: loss is per supervised position, nll per supervised title."""

    loss: jax.Array
    nll_per_title: jax.Array
    grad_norm: jax.Array


def cf_logits(cf_BxPxD: jax.Array, items: CFItems) -> jax.Array:
    """float32 item logits [B, P, I] from user vectors, or the stored logits themselves."""
    if items.table_IxD is None:
        return cf_BxPxD
    logits = jnp.einsum("bpd,id->bpi", cf_BxPxD, items.table_IxD)
    return logits if items.bias_I is None else logits + items.bias_I[None, None, :]


def batch_loss(
    decoder: Decoder,
    batch: Batch,
    cf_items: CFItems,
    trie: TrieArrays,
    temperatures: Temperatures,
    *,
    trie_shape: TrieShape,
    form: str,
    softmax: str,
    dropout_key: jax.Array | None = None,
) -> Loss:
    """Sums of the soft NTP objective over a batch (method.md; see soft_ntp).

    With softmax 'children' vocabulary logits exist at decisions only, with 'vocabulary' at the
    supervised positions; the projection is float32 whatever the decoder's dtype.
    """
    hidden_BxSxD = decoder.hidden(batch.tokens_BxS, batch.length_B, dropout_key=dropout_key)
    logits_BxPxI = cf_logits(batch.cf_BxPxD, cf_items)
    rows, pairs, items = logits_BxPxI.shape
    mass_QxN = node_log_mass(
        logits_BxPxI.reshape(rows * pairs, items), trie, trie_shape, temperatures.beta
    )
    mass_BxPxN = mass_QxN.reshape(rows, pairs, -1)

    def row_loss(hidden_SxD, mass_PxN, row: Batch):
        tokens_KxC, log_p_KxC = child_log_probs(
            mass_PxN, row.decision_title_BxK, row.decision_node_BxK, trie, trie_shape
        )
        decisions = Decisions(
            position_K=row.decision_position_BxK,
            weight_K=row.decision_weight_BxK,
            label_child_K=row.decision_child_BxK,
            child_token_KxC=tokens_KxC,
            log_p_cf_KxC=log_p_KxC,
        )
        alpha, tau = temperatures.alpha, temperatures.tau
        if softmax == "children":
            position_K = row.position_BxT[decisions.position_K]
            return children_loss(
                decoder.logits(hidden_SxD[position_K]), decisions, alpha, tau, form
            )
        return vocabulary_loss(
            decoder.logits(hidden_SxD[row.position_BxT]),
            row.label_BxT,
            row.weight_BxT,
            decisions,
            alpha,
            tau,
            form,
        )

    total_B, nll_B = jax.vmap(row_loss)(hidden_BxSxD, mass_BxPxN, batch)
    return Loss(
        total=jnp.sum(total_B),
        positions=jnp.sum(batch.weight_BxT),
        nll=jnp.sum(nll_B),
        titles=jnp.sum(batch.title_weight_BxP),
    )


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, total_steps: int, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW, linear warm-up, then linear decay to zero; gradients are clipped by norm."""
    warmup = min(warmup_steps, max(total_steps - 1, 0))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay)
    )


def init_state(adapters: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), adapters, optimizer.init(adapters))


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    trie_shape: TrieShape,
    form: str,
    softmax: str,
    seed: int,
):
    """The jitted update (state, base, batch, cf_items, trie, temperatures) -> (state, Metrics).

    Every device differentiates the *sum* of its rows' losses with respect to the adapters (no
    gradient of a base weight is computed); sums and gradients are then joined in a single psum, so
    shards of unequal size average exactly. The dropout of step n is a function of (seed, n,
    device), so a resumed run repeats it. The state is donated.
    """

    def sums_and_gradients(adapters, base, batch, cf_items, trie, temperatures, key):
        def total(adapters):
            loss = batch_loss(
                nnx.merge(graph, adapters, base),
                batch,
                cf_items,
                trie,
                temperatures,
                trie_shape=trie_shape,
                form=form,
                softmax=softmax,
                dropout_key=jax.random.fold_in(key, jax.lax.axis_index("data")),
            )
            return loss.total, loss

        (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(adapters)
        # One collective: on CPU several in flight can starve each other of threads.
        flat, unflatten = ravel_pytree((loss, gradients))
        return unflatten(jax.lax.psum(flat, "data"))

    everywhere, rows = PartitionSpec(), PartitionSpec("data")
    on_mesh = jax.shard_map(
        sums_and_gradients,
        mesh=mesh,
        in_specs=(everywhere, everywhere, rows, everywhere, everywhere, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, base, batch, cf_items, trie, temperatures):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, gradients = on_mesh(state.adapters, base, batch, cf_items, trie, temperatures, key)
        positions = jnp.maximum(loss.positions, 1.0)
        gradients = jax.tree.map(lambda g: g / positions, gradients)
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = Metrics(
            loss.total / positions,
            loss.nll / jnp.maximum(loss.titles, 1.0),
            optax.global_norm(gradients),
        )
        return TrainState(state.step + 1, adapters, opt_state), metrics

    return train_step
