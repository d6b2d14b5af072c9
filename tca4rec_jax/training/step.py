"""The training step: one update of the adapters or of every weight, for any recommender's loss.

Axes: core/__init__.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.core.objective import Loss
from tca4rec_jax.distributed.data_parallel import RowParallel
from tca4rec_jax.distributed.sharded_projection import project_shards
from tca4rec_jax.distributed.sharding import parameters, replicated, row_sharding
from tca4rec_jax.training.state import Metrics, TrainState, in_dtype


def make_train_step(
    graph: nnx.GraphDef,
    state: TrainState,
    base: nnx.State,
    optimizer: optax.GradientTransformation,
    batch_loss: Callable[..., Loss],
    *,
    mesh: Mesh,
    seed: int,
    compute_dtype: str | None = None,
):
    """The jitted update (state, base, batch, cf_items, trie, objective) -> (state, Metrics).

    `state` and `base` say where their arrays live (arrays, or ShapeDtypeStructs with a sharding:
    sharding.tree_shardings); `cf_items` and `trie` live as put_cf puts them. The state is donated.
    `batch_loss` is a recipe's (recommenders.recipe).

    Every device differentiates the *sum* of its rows' losses with respect to state.params (no
    gradient of anything in `base` is computed), which are rounded to compute_dtype if it is given;
    sums and gradients are then added up over all rows, so shards of unequal size average exactly.
    The dropout of step n is a function of (seed, n, row of the batch): a resumed run repeats it, on
    any mesh.

    A loss or gradient that is not finite halts the run: parameters and optimiser stay as they are,
    and the step becomes -1 - step. The loop sees it only after it has dispatched the next step,
    which therefore leaves a halted state alone too.
    """
    on_rows = RowParallel(mesh)
    state_places, base_places = jax.tree.map(lambda array: array.sharding, (state, base))
    spec_of = {path: place.spec for path, place in parameters((state_places.params, base_places))}

    def sums_and_gradients(params, base, batch, row_B, cf_items, trie, objective, key):
        def total(params):
            decoder = nnx.merge(graph, in_dtype(params, compute_dtype), base)
            decoder.options = dataclasses.replace(
                decoder.options, whole=functools.partial(whole, on_rows, spec_of)
            )
            loss = batch_loss(
                decoder,
                batch,
                cf_items,
                trie,
                objective,
                dropout_key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, row_B),
                project=functools.partial(project_shards, on_rows),
            )
            return loss.total, loss

        (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(params)
        gradient_specs = jax.tree.map(lambda place: place.spec, state_places.params)
        loss_specs = jax.tree.map(lambda _: PartitionSpec(), loss)
        return on_rows.sum((loss, gradients), (loss_specs, gradient_specs))

    def parts(places):
        return jax.tree.map(lambda place: on_rows.part(place.spec), places)

    everywhere, gradient_parts = PartitionSpec(), parts(state_places.params)
    on_mesh = on_rows(
        sums_and_gradients,
        in_specs=(gradient_parts, parts(base_places), *[on_rows.rows] * 2, *[everywhere] * 4),
        out_specs=(everywhere, gradient_parts),
    )

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(state_places, base_places, row_sharding(mesh), None, None, replicated(mesh)),
        out_shardings=(state_places, replicated(mesh)),
    )
    def train_step(state: TrainState, base, batch, cf_items, trie, objective):
        running = state.step >= 0
        key = jax.random.fold_in(
            jax.random.key(seed), jnp.where(running, state.step, -1 - state.step)
        )
        row_B = jnp.arange(batch.length_B.shape[0], dtype=jnp.int32)
        loss, gradients = on_mesh(state.params, base, batch, row_B, cf_items, trie, objective, key)
        positions = jnp.maximum(loss.positions, 1.0)
        gradients = jax.tree.map(lambda g: g / positions, gradients)
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(
            loss.total / positions,
            loss.nll / jnp.maximum(loss.titles, 1.0),
            optax.global_norm(gradients),
        )
        good = running & jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        halted = state._replace(step=jnp.where(running, -1 - state.step, state.step))
        updated = TrainState(state.step + 1, params, opt_state)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), updated, halted), metrics

    return train_step


def whole(
    on_rows: RowParallel, spec_of: Mapping[str, PartitionSpec], path: str, weight: jax.Array
) -> jax.Array:
    """DecoderOptions.whole of a step whose parameters live as spec_of says."""
    spec = spec_of[path]
    return on_rows.whole(weight, PartitionSpec(*spec[1:]) if path.startswith("layers/") else spec)
