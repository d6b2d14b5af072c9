"""MSL's adaptive temperature: a tau that follows the spread of the logits (arXiv 2504.04178).

    tau = (d + sqrt(max(d^2 - 2 C v, 0))) / (2 C),   C = log(eta * number of first tokens)

d is the mean logit of the targets less that of all first tokens of titles, v the variance of the
latter, at the first decision of every supervised title of a batch. The published code takes the
moments of the batch whose loss tau scales; here they are those of the batches before, so that the
loss needs no other device's rows: with a weight of 0.05 a batch the two differ by little.
"""

import jax
import jax.numpy as jnp

from tca4rec_jax.core.losses import Moments
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.errors import UserError


def check_eta(eta: float, children: int) -> None:
    """Raises UserError if C is not above 0, so that no tau solves the equation."""
    if eta * children <= 1:
        raise UserError(
            f"objective.eta is {eta}: expected more than 1 / {children}, the number of first "
            "tokens of the titles (objective.temperature=fixed needs none)"
        )


def adapted(
    tau: jax.Array, moments: Moments, children: jax.Array | int, objective: Objective
) -> jax.Array:
    """The running tau after a batch (float32); `children` are those of the trie's first decision.

    The objective has eta, the bounds of the batch's own tau, and its weight.
    """
    spread = jnp.log(objective.eta * jnp.asarray(children, jnp.float32))
    mean = moments.logits / jnp.maximum(moments.tokens, 1.0)
    above = moments.target_logits / jnp.maximum(moments.targets, 1.0) - mean
    variance = moments.squares / jnp.maximum(moments.tokens, 1.0) - jnp.square(mean)
    root = jnp.sqrt(jnp.maximum(jnp.square(above) - 2.0 * spread * variance, 0.0))
    of_batch = jnp.clip((above + root) / (2.0 * spread), *objective.tau_bounds)
    weight = objective.tau_weight
    return jnp.where(moments.targets > 0, (1.0 - weight) * tau + weight * of_batch, tau)
