"""Runs a function of one layer for some layers in a row, whose parameters are stacked on axis 0.

A GPU's matrix products read a layer's weights where they lie only if XLA sees that its number comes
from the counter of the compiled loop; with a number read from an array each matrix is copied first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tca4rec_jax.llm.blocks import SAVE_PRODUCTS

# (x, the layer's parameters, its number) -> (x, what it leaves); trees of arrays.
RunLayer = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def at_layer(stack: jax.Array, layer: jax.Array, axis: int = 0) -> jax.Array:
    """The entry of one layer of an array that is stacked over layers on `axis`."""
    return jax.lax.dynamic_index_in_dim(stack, layer, axis, keepdims=False)


def run(run_layer: RunLayer, x: Any, stacks: Any, layers: range) -> tuple[Any, Any]:
    """(x after the layers, what each left, stacked); not to be differentiated."""

    def one(x, index):
        return run_layer(x, jax.tree.map(lambda stack: at_layer(stack, index), stacks), index)

    def next_layer(carry):
        done, x, left = carry
        x, new = one(x, layers.start + done)
        put = jax.lax.dynamic_update_index_in_dim
        left = jax.tree.map(lambda all, one: put(all, one, done, 0), left, new)
        return done + 1, x, left

    _, shapes = jax.eval_shape(one, x, jnp.int32(layers.start))
    left = jax.tree.map(lambda new: jnp.zeros((len(layers), *new.shape), new.dtype), shapes)
    nothing = jnp.int32(0), x, left
    return jax.lax.while_loop(lambda carry: carry[0] < len(layers), next_layer, nothing)[1:]


def scan(
    run_layer: RunLayer, x: Any, stacks: tuple[Any, Any], layers: range, remat: str
) -> tuple[Any, Any]:
    """As `run`, to be differentiated.

    stacks: (of the base weights, of the adapters); remat: of DecoderOptions.
    """
    weights, adapters = stacks

    def one(x, inputs):
        weights_of, adapters_of, index = inputs
        if weights_of is None:
            weights_of = jax.tree.map(lambda stack: at_layer(stack, index), weights)
        return run_layer(x, (weights_of, adapters_of), index)

    if remat != "none":
        policy = SAVE_PRODUCTS if remat == "products" else None
        one = jax.checkpoint(one, policy=policy, prevent_cse=False)
    # A slice of the stacks would be a copy; where only some layers run, each picks its own.
    every = jax.tree.leaves(weights)[0].shape[0] == len(layers)
    adapters = jax.tree.map(lambda stack: stack[layers.start : layers.stop], adapters)
    inputs = weights if every else None, adapters, jnp.arange(layers.start, layers.stop)
    return jax.lax.scan(one, x, inputs)
