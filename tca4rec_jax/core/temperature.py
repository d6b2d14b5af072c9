"""MSL's adaptive temperature: a tau that follows the spread of the logits (arXiv 2504.04178).

    tau = (d + sqrt(max(d^2 - 2 C v, 0))) / (2 C),   C = log(eta * number of first tokens)

d is the mean logit of the targets less that of all first tokens of titles, v the variance of the
latter, at the first decision of every supervised title of a batch. The published code takes the
moments of the batch whose loss tau scales; here they are those of the batches before, so that the
loss needs no other device's rows: with a weight of 0.05 a batch the two differ by little.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.errors import UserError


class Moments(NamedTuple):
    """Sums over the first decisions of titles, float32: of the targets, and of all children."""

    targets: jax.Array
    target_logits: jax.Array
    tokens: jax.Array
    logits: jax.Array
    squares: jax.Array

    @classmethod
    def of(cls, z_KxC, absent_KxC, child_K, weight_K) -> "Moments":
        """Of the logits of the children at decisions, which count if their weight is not 0."""
        weight_KxC = jnp.where(absent_KxC, 0.0, weight_K[:, None])
        target_K = jnp.take_along_axis(z_KxC, child_K[:, None], axis=1)[:, 0]
        return cls(
            targets=jnp.sum(weight_K),
            target_logits=jnp.sum(weight_K * target_K),
            tokens=jnp.sum(weight_KxC),
            logits=jnp.sum(weight_KxC * z_KxC),
            squares=jnp.sum(weight_KxC * jnp.square(z_KxC)),
        )


def check_eta(eta: float, children: int) -> None:
    """Raises UserError if C is not above 0, so that no tau solves the equation."""
    if eta * children <= 1:
        raise UserError(
            f"objective.eta is {eta}: expected more than 1 / {children}, the number of first "
            "tokens of the titles (objective.temperature=fixed needs none)"
        )


def adapted(
    tau: jax.Array,
    moments: Moments,
    children: jax.Array | int,
    *,
    eta: float,
    bounds: tuple[float, float],
    weight: float,
) -> jax.Array:
    """The running tau after a batch (float32): `weight` is that of the batch's own, in `bounds`.

    `children` are those of the trie's first decision.
    """
    spread = jnp.log(eta * jnp.asarray(children, jnp.float32))
    mean = moments.logits / jnp.maximum(moments.tokens, 1.0)
    above = moments.target_logits / jnp.maximum(moments.targets, 1.0) - mean
    variance = moments.squares / jnp.maximum(moments.tokens, 1.0) - jnp.square(mean)
    root = jnp.sqrt(jnp.maximum(jnp.square(above) - 2.0 * spread * variance, 0.0))
    of_batch = jnp.clip((above + root) / (2.0 * spread), *bounds)
    return jnp.where(moments.targets > 0, (1.0 - weight) * tau + weight * of_batch, tau)
