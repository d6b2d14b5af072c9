"""A decoder's parameters by '/'-joined path: random ones, and whether given ones fit."""

from functools import partial

import jax
import jax.numpy as jnp

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig


@partial(jax.jit, static_argnums=(0, 2))
def init_params(
    config: DecoderConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Random base parameters by '/'-joined path: matrices normal with variance 1/in.

    Norms change nothing and biases are zero.
    """
    params = {}
    for index, (path, shape) in enumerate(config.parameter_shapes.items()):
        if path.endswith(("_norm", "_bias")):
            value = 1 - config.norm_offset if path.endswith("_norm") else 0
            params[path] = jnp.full(shape, value, dtype)
            continue
        fan_in = config.hidden_size if path == "embedding" else shape[-2]
        values = jax.random.normal(jax.random.fold_in(key, index), shape) * fan_in**-0.5
        params[path] = values.astype(dtype)
    return params


def check_shapes(
    what: str, arrays: dict[str, jax.Array], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raises UserError naming every array that is missing, unknown or of another shape."""
    problems = [f"missing {path}" for path in expected if path not in arrays]
    problems += [f"unknown {path}" for path in arrays if path not in expected]
    problems += [
        f"{path} has shape {tuple(arrays[path].shape)}, expected {shape}"
        for path, shape in expected.items()
        if path in arrays and tuple(arrays[path].shape) != shape
    ]
    if problems:
        raise UserError(f"{what} do not fit the config: " + "; ".join(problems))
