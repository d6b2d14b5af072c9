"""Whether a CF model's probabilities come true: the calibration of p_cf.

Axis letters: R rows, B rows of a batch, I items, J cutoffs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.distributed.multihost import gather_process_rows, process_rows
from tca4rec_jax.evaluation.rankings import EvaluationRows, rows_at_once
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.metrics import hit_rate, rank_in_batch

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
    batch_size = batch_size or rows_at_once(num_items)
    program = partial(_first_items, tuple(cutoffs), items, np.float32(beta))
    return FirstItems(*map_batches(program, cf_RxD, target_R, batch_size=batch_size))


@partial(jax.jit, static_argnums=0)
def _first_items(cutoffs: tuple[int, ...], items: CFItems, beta, cf_BxD, target_B):
    logits_BxI = cf_logits(cf_BxD, items) / beta
    places = min(cutoffs[-1], logits_BxI.shape[1])
    best_BxM, _ = jax.lax.top_k(jax.nn.softmax(logits_BxI, axis=1), places)
    at_J = np.minimum(cutoffs, places) - 1
    return jnp.cumsum(best_BxM, axis=1)[:, at_J], rank_in_batch(logits_BxI, target_B)


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
