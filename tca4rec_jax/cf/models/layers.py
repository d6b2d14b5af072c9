"""What the CF models share: dropout, and variables that are counted instead of trained."""

import jax
import jax.numpy as jnp
from flax import nnx


class Dropout(nnx.Module):
    """Inverted dropout whose randomness is an argument, so that the module has no state."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x with a random share of its numbers set to zero; x itself without a key."""
        if key is None or self.rate == 0.0:
            return x
        # Bytes are four times cheaper to draw than floats; the rate is exact to 1/256.
        kept = round(256 * (1.0 - self.rate))
        keep = jax.random.bits(key, x.shape, jnp.uint8) < kept
        return jnp.where(keep, x * (256.0 / kept), 0.0)


class Statistic(nnx.Variable):
    """A constant that `fit_statistics` takes from the training data; saved, never trained."""
