"""What a CF model is like beyond its accuracy: coverage, popularity bias, sharpness.

Axis letters: R rows, B rows of one batch, I items, K recommended items, T temperatures.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.scoring import cf_logits, entries, item_arrays
from tca4rec_jax.data.sequences import ItemSequences

BETAS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
TOP = 10


def profile(model: nnx.Module, rows: ItemSequences, count_I: np.ndarray) -> dict:
    """Describes a CF model on rows whose last item is the target.

    Args:
      model: see models.py.
      rows: histories with targets.
      count_I: int [I], each item's interactions in the training period.

    Returns:
      'coverage@10': share of the catalogue that is among anyone's first ten.
      'popularity@10': mean training interactions of the first tens, over the mean of the targets: 1
        recommends things as popular as those chosen.
      'entropy', 'nll': {beta: nats}, of the softmax at that CF temperature, and of the target.
      'best_beta': the beta of BETAS with the lowest NLL: where this model is calibrated best.
    """
    entry_RxD = entries(model, rows, rows.last_positions)
    item_side, target_R = item_arrays(model), rows.items[rows.last_positions]
    size, num_rows, parts = min(1024, len(rows)), len(rows), []
    for start in range(0, num_rows, size):
        padding = ((0, size - len(target_R[start : start + size])), (0, 0))
        entry_BxD = np.pad(entry_RxD[start : start + size], padding)
        target_B = np.pad(target_R[start : start + size], padding[0])
        parts.append([np.asarray(part) for part in _describe(TOP, entry_BxD, *item_side, target_B)])
    best_RxK, entropy_RxT, nll_RxT = (
        np.concatenate(part)[:num_rows] for part in zip(*parts, strict=True)
    )
    nll_T = nll_RxT.mean(axis=0)
    names = [f"{beta:g}" for beta in BETAS]
    return {
        f"coverage@{TOP}": len(np.unique(best_RxK)) / len(count_I),
        f"popularity@{TOP}": float(count_I[best_RxK].mean() / max(count_I[target_R].mean(), 1e-9)),
        "entropy": dict(zip(names, entropy_RxT.mean(axis=0).tolist(), strict=True)),
        "nll": dict(zip(names, nll_T.tolist(), strict=True)),
        "best_beta": BETAS[int(np.argmin(nll_T))],
    }


@functools.partial(jax.jit, static_argnums=0)
def _describe(top, entry_BxD, item_table_IxD, item_bias_I, target_B):
    logits_BxI = cf_logits(entry_BxD, item_table_IxD, item_bias_I)
    _, best_BxK = jax.lax.top_k(logits_BxI, min(top, logits_BxI.shape[1]))

    def at(beta):
        log_share_BxI = jax.nn.log_softmax(logits_BxI / beta, axis=1)
        entropy_B = -jnp.sum(jnp.exp(log_share_BxI) * log_share_BxI, axis=1)
        return entropy_B, -jnp.take_along_axis(log_share_BxI, target_B[:, None], axis=1)[:, 0]

    entropy_TxB, nll_TxB = jax.lax.map(at, jnp.asarray(BETAS, jnp.float32))
    return best_BxK, entropy_TxB.T, nll_TxB.T
