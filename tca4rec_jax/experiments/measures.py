"""How far lists agree with a CF model.

Axis letters: R rows, B rows of a block, D width of what a CF logits store holds, I items, M places
of a list.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.logits_format import StorePath
from tca4rec_jax.cf.logits_store import open_store
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.evaluation.rankings import EvaluationRows, rows_at_once
from tca4rec_jax.experiment import Experiment

AGREEMENT, FLUENCY = "agreement with CF models", "fluency"
"""The names among the metrics of a line of these numbers and of what fluency.py measures.

(Lines may have an older "agreement", which took tied items in catalogue order.)
"""


def agreement_with(
    store: StorePath, experiment: Experiment, rows: EvaluationRows, items_RxM: np.ndarray
) -> dict[str, float]:
    """The `agreement` of lists (int32 [R, M], -1 where there are no more) with a CF model.

    `store` has its logits on the rows' split; only what may be recommended has a place. Raises as
    `open_store`.
    """
    data = experiment.data
    split = data.splits[rows.split], data.catalogue
    opened = open_store(store, *split, positions=rows.position_R)
    cf = LazyRows(opened.read, rows.position_R, opened.width)
    masks = rows.allowed(experiment.item_filter)
    allowed = masks and LazyRows(masks, np.arange(len(rows)), data.catalogue.num_items)
    return agreement(listed_cf_ranks(cf, opened.cf_items, items_RxM, allowed=allowed))


def listed_cf_ranks(
    cf_RxD: np.ndarray | LazyRows,
    items: CFItems,
    items_RxM: np.ndarray,
    *,
    allowed: np.ndarray | LazyRows | None = None,
) -> np.ndarray:
    """float32 [R, M]: the place (from 0) that a CF model gives each listed item; -1 where none is.

    Items of one logit, as all that a cut store does not hold, share the mean of their places.
    `cf_RxD`, `items` and `allowed` are as in `full_ranking`.
    """
    arrays = [cf_RxD, items_RxM, *([] if allowed is None else [allowed])]
    num_items = cf_RxD.shape[1] if items.table_IxD is None else len(items.table_IxD)
    at_once = max(rows_at_once(num_items) // items_RxM.shape[1], 1)
    return map_batches(partial(_rank_listed, items), *arrays, batch_size=at_once)


@jax.jit
def _rank_listed(items: CFItems, cf_BxD, listed_BxM, allowed_BxI=None):
    logits_BxI = cf_logits(cf_BxD, items)
    if allowed_BxI is not None:
        logits_BxI = jnp.where(allowed_BxI, logits_BxI, -jnp.inf)

    def mean_place(listed_B):
        own_Bx1 = jnp.take_along_axis(logits_BxI, listed_B[:, None], axis=1)
        higher_B, tied_B = (of(logits_BxI, own_Bx1).sum(axis=1) for of in (jnp.greater, jnp.equal))
        return (higher_B + (tied_B - 1) / 2).astype(jnp.float32)

    rank_BxM = jax.vmap(mean_place, in_axes=1, out_axes=1)(jnp.maximum(listed_BxM, 0))
    return jnp.where(listed_BxM < 0, -1.0, rank_BxM)


def agreement(cf_rank_RxM: np.ndarray) -> dict[str, float]:
    """How far lists agree with a CF model that gives their items these places; means over rows.

    'cf rank of the first' and 'cf rank of the list' count from 1; 'first of both' is the share of
    lists whose first item is, alone, the CF model's first, 'overlap' the share of a list that is
    among as many best items of the CF model. 'kendall tau' compares the order of a list with that
    which the CF model gives the same items: the pairs in the same order less those in the other,
    over the geometric mean of all pairs and those that the CF model tells apart (tau-b; Kendall,
    1945). A row without a list does not count, nor for tau one whose items the CF model does not
    tell apart; a number of no row is left out.
    """
    there_RxM = cf_rank_RxM >= 0
    length_R = there_RxM.sum(axis=1)
    listed = length_R > 0
    sum_R = np.where(there_RxM, cf_rank_RxM + 1, 0).sum(axis=1)
    shared_R = (there_RxM & (cf_rank_RxM < length_R[:, None])).sum(axis=1)
    earlier, later = np.triu_indices(cf_rank_RxM.shape[1], k=1)
    pair = there_RxM[:, earlier] & there_RxM[:, later]
    order = np.where(pair, np.sign(cf_rank_RxM[:, later] - cf_rank_RxM[:, earlier]), 0)
    told_apart_R = np.abs(order).sum(axis=1)
    tau_R = order.sum(axis=1) / np.sqrt(np.maximum(pair.sum(axis=1) * told_apart_R, 1))
    columns = {
        "cf rank of the first": (cf_rank_RxM[:, 0] + 1.0, listed),
        "cf rank of the list": (sum_R / np.maximum(length_R, 1), listed),
        "first of both": (cf_rank_RxM[:, 0] == 0, listed),
        "overlap": (shared_R / np.maximum(length_R, 1), listed),
        "kendall tau": (tau_R, told_apart_R > 0),
    }
    return {name: float(of_R[rows].mean()) for name, (of_R, rows) in columns.items() if rows.any()}
