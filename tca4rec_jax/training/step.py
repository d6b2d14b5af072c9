"""The training step: one update of the adapters or of every weight, for any recommender's loss.

Axes: core/__init__.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.batching import sum_over
from tca4rec_jax.core.losses import Loss
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.distributed.data_parallel import DataParallel, ShardedWeight
from tca4rec_jax.distributed.sharded_projection import project_shards
from tca4rec_jax.distributed.sharding import replicated, row_sharding
from tca4rec_jax.training.state import Metrics, TrainState, Tree, hold, in_dtype
from tca4rec_jax.training.temperature import adapted


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step goes about it.

    Attributes:
      seed: of the dropout.
      held: the parts of the decoder that are left alone (state.hold).
      dtype: the decoder computes with the trained parameters rounded to it; None: as they are.
      micro_batches: a device goes through its rows in so many, which must divide them, one after
        the other.
      steps: of the training, which a schedule of the objective needs.
    """

    seed: int = 0
    held: tuple[str, ...] = ()
    dtype: str | None = None
    micro_batches: int = 1
    steps: int = 0

    def weights_of(self, params: Tree) -> Tree:
        """What the decoder computes with."""
        return in_dtype(hold(params, self.held), self.dtype)


def make_train_step(
    graph: nnx.GraphDef,
    state: TrainState,
    base: nnx.State,
    optimizer: optax.GradientTransformation,
    batch_loss: Callable[..., Loss],
    mesh: Mesh,
    options: StepOptions = StepOptions(),
) -> jax.stages.Wrapped:
    """The jitted update (state, base, batch, cf_items, trie, objective) -> (state, Metrics).

    `state` and `base` say where their arrays live (arrays, or ShapeDtypeStructs with a sharding:
    sharding.tree_shardings); `cf_items` and `trie` live where cf_shardings says. The state is
    donated. `batch_loss` is a recipe's (recommenders.recipe).

    The dropout of step n is a function of (seed, n, row of the batch): a resumed run repeats it, on
    any mesh.

    A loss or gradient that is not finite halts the run: parameters and optimizer stay as they are,
    and the step becomes -1 - step. The loop sees it only after it has dispatched the next step,
    which therefore leaves a halted state alone too.

    Equal arguments give the same update, which is compiled once.
    """
    leaves, tree = jax.tree.flatten((state, base))
    shardings = tuple(leaf.sharding for leaf in leaves)
    return _train_step(graph, optimizer, batch_loss, mesh, options, shardings, tree)


@functools.lru_cache(maxsize=2)  # a run that goes on, or the next one of the same sizes
def _train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    batch_loss: Callable[..., Loss],
    mesh: Mesh,
    options: StepOptions,
    leaves: tuple[jax.sharding.Sharding, ...],
    tree: jax.tree_util.PyTreeDef,
) -> jax.stages.Wrapped:
    """`make_train_step`; `leaves` and `tree` are the shardings of (state, base)."""
    shardings = jax.tree.unflatten(tree, leaves)
    state_specs, base_specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    specs = state_specs.params, base_specs
    loss_and_gradients = _loss_and_gradients(graph, batch_loss, mesh, specs, options)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(*shardings, row_sharding(mesh), None, None, replicated(mesh)),
        out_shardings=(shardings[0], replicated(mesh)),
    )
    def train_step(state: TrainState, base, batch, cf_items, trie, objective):
        running = state.step >= 0
        step = jnp.where(running, state.step, -1 - state.step)
        key = jax.random.fold_in(jax.random.key(options.seed), step)
        row_B = jnp.arange(batch.length_B.shape[0], dtype=jnp.int32)
        objective = objective.at(step, options.steps)
        if state.tau is not None:
            objective = dataclasses.replace(objective, tau=state.tau)
        loss, gradients = loss_and_gradients(
            state.params, base, batch, row_B, cf_items, trie, objective, key
        )
        updated, metrics = _updated(state, loss, gradients, optimizer, trie, objective)
        good = running & jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        halted = state._replace(step=-1 - step)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), updated, halted), metrics

    return train_step


def _updated(
    state: TrainState,
    loss: Loss,
    gradients,
    optimizer: optax.GradientTransformation,
    trie: DeviceTrie,
    objective: Objective,
) -> tuple[TrainState, Metrics]:
    """The state after a step of this loss, whose gradients are sums over all rows."""
    positions = jnp.maximum(loss.positions, 1.0)
    gradients = jax.tree.map(lambda g: g / positions, gradients)
    updates, opt_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    nll = loss.nll / jnp.maximum(loss.titles, 1.0)
    norm = optax.global_norm(gradients)
    tau = state.tau
    if tau is not None and loss.moments is not None:
        children = trie.child_count[trie.sizes.first_decision]
        tau = adapted(tau, loss.moments, children, objective)
    metrics = Metrics(loss.total / positions, nll, norm, state.tau)
    return TrainState(state.step + 1, params, opt_state, tau), metrics


def _loss_and_gradients(
    graph: nnx.GraphDef,
    batch_loss: Callable,
    mesh: Mesh,
    specs: tuple,
    options: StepOptions,
) -> Callable:
    """(params, base, batch, row_B, cf_items, trie, objective, key) -> (Loss, gradients of params).

    `specs` are those of params and base. Every device differentiates the *sum* of its rows' losses
    (no gradient of anything in `base` is computed). Sums and gradients are then added up over its
    micro-batches and over all devices, so rows of unequal size average exactly, however they were
    split.
    """
    on_rows, (params_specs, base_specs) = DataParallel(mesh), specs
    sharded = functools.partial(jax.tree.map, functools.partial(ShardedWeight.wrap, on_rows))

    def sums_and_gradients(params, base, batch, row_B, cf_items, trie, objective, key):
        def total(params, batch, row_B):
            weights = sharded(options.weights_of(params), params_specs)
            decoder = nnx.merge(graph, weights, sharded(base, base_specs))
            key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)
            given = {"dropout_key_B": key_B, "project": functools.partial(project_shards, on_rows)}
            loss = batch_loss(decoder, batch, cf_items, trie, objective, **given)
            return loss.total, loss

        def of_rows(batch, row_B):
            (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(params, batch, row_B)
            return loss, gradients

        sums = _in_micro_batches(of_rows, options.micro_batches, (batch, row_B))
        loss_specs = jax.tree.map(lambda _: PartitionSpec(), sums[0])
        return on_rows.sum(sums, (loss_specs, params_specs))

    params_parts, base_parts = jax.tree.map(on_rows.manual_part, specs)
    everywhere = PartitionSpec()
    in_specs = params_parts, base_parts, *[on_rows.rows] * 2, *[everywhere] * 4
    return on_rows(sums_and_gradients, in_specs, (everywhere, params_parts))


def _in_micro_batches(sums: Callable, count: int, rows: tuple) -> tuple:
    """sums(*rows), added up over micro-batches: so many parts of the rows, of one size."""
    if count == 1:
        return sums(*rows)
    return sum_over(sums, jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), rows))
