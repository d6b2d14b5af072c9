"""Whether a CF model's probabilities come true: the calibration of p_cf.

Axis letters: R rows, B rows of a batch, I items, W items of a block, J cutoffs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.item_blocks import Highest, LogSum, fold, highest_of
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.distributed.multihost import gather_process_rows, process_rows
from tca4rec_jax.evaluation.rankings import EvaluationRows, batch_rows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.metrics import ahead_of, hit_rate

BINS = 10


def calibrations(
    experiment: Experiment,
    rows: EvaluationRows,
    models: Mapping[str, tuple[np.ndarray | LazyRows, CFItems]],
) -> dict[str, dict[str, float]]:
    """`calibration` of `cf_models` at objective.beta, the temperature of the soft labels."""
    beta, cutoffs = experiment.config.objective.beta, experiment.config.evaluation.cutoffs
    target_R = rows.target_R[process_rows(len(rows))]
    found = {label: first_items(*one, target_R, beta, cutoffs) for label, one in models.items()}
    return {
        label: calibration(gather_process_rows(one, len(rows)), cutoffs)
        for label, one in found.items()
    }


class FirstItems(NamedTuple):
    """What a CF model says of its first K items of each row, and whether the target is there."""

    mass_RxJ: np.ndarray  # float32, the sum of their probabilities
    rank_R: np.ndarray  # int32, 0-based, of the target among all items


def first_items(
    cf_RxD: np.ndarray | LazyRows,
    items: CFItems,
    target_R: np.ndarray,
    beta: float,
    cutoffs: Sequence[int],
    *,
    batch_size: int = 0,
) -> FirstItems:
    """Of softmax(CF logits / beta) over the whole catalogue, that of the soft labels: no filter.

    Models are given, and memory is bounded, as in `full_ranking`.
    """
    num_items = cf_RxD.shape[1] if items.table_IxD is None else len(items.table_IxD)
    items = jax.tree.map(jnp.asarray, items)
    batch_size = batch_size or batch_rows(items, num_items)
    program = partial(_first_items, tuple(cutoffs), items, np.float32(beta))
    return FirstItems(*map_batches(program, cf_RxD, target_R, batch_size=batch_size))


@partial(jax.jit, static_argnums=0)
def _first_items(cutoffs: tuple[int, ...], items: CFItems, beta, cf_BxD, target_B):
    rows = len(target_B)
    num_items = cf_BxD.shape[1] if items.table_IxD is None else len(items.table_IxD)
    places = min(cutoffs[-1], num_items)

    def look(state, logits_BxW, item_W):
        log_sum, own_B, highest = state
        z_BxW, is_target_BxW = logits_BxW / beta, item_W[None, :] == target_B[:, None]
        own_B = highest_of(logits_BxW, is_target_BxW, own_B)
        return log_sum.add(z_BxW), own_B, highest.add(z_BxW, item_W)

    state = LogSum.nothing(rows), jnp.full(rows, -jnp.inf), Highest.nothing(rows, places)
    log_sum, own_B, highest = fold(look, state, cf_BxD, items)

    def count(rank_B, logits_BxW, item_W):
        ahead_BxW = ahead_of(logits_BxW, item_W, own_B, target_B)
        return rank_B + jnp.sum(ahead_BxW, axis=1, dtype=jnp.int32)

    rank_B = fold(count, jnp.zeros(rows, jnp.int32), cf_BxD, items)
    share_BxM = jnp.exp(highest.values_BxM - log_sum.value_B[:, None])
    at_J = np.minimum(cutoffs, places) - 1
    return jnp.cumsum(share_BxM, axis=1)[:, at_J], rank_B


def calibration(found: FirstItems, cutoffs: Sequence[int]) -> dict[str, float]:
    """{'mass@K' | 'hr@K' | 'ece@K': value}: probability of the first K items, and how often right.

    mass is the mean of their probability; hr of what happened, over the whole catalogue. ece is the
    expected calibration error: rows are cut by their mass into BINS bins of as many rows each, and
    the distance between mean mass and HR in a bin is averaged over the rows (Naeini et al., AAAI
    2015; Guo et al., ICML 2017, for K = 1; bins of as many rows: Nguyen and O'Connor, EMNLP 2015).
    """
    values: dict[str, float] = {}
    for k, mass_R in zip(cutoffs, found.mass_RxJ.T.astype(np.float64), strict=True):
        hit_R, order_R = hit_rate(found.rank_R, k), np.argsort(mass_R, kind="stable")
        bins = np.array_split(order_R, min(BINS, len(order_R)))
        gaps = [len(rows) * abs(mass_R[rows].mean() - hit_R[rows].mean()) for rows in bins]
        values |= {f"mass@{k}": float(mass_R.mean()), f"hr@{k}": float(hit_R.mean())}
        values[f"ece@{k}"] = float(sum(gaps)) / len(order_R)
    return values
