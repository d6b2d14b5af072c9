"""What is done about items that a quantiser gives the same codes. Nothing of it is silent.

Axis letters: I items, L levels, E width of their last residuals, n items of the groups that
collide, K codes of the last level.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.semantic_ids.assignment import LAST_LEVEL_EPSILON, LAST_LEVEL_ROUNDS, sinkhorn
from tca4rec_jax.semantic_ids.ids import LEVELS, SemanticIds
from tca4rec_jax.semantic_ids.k_means import Quantised, squared_distances

Policy = Literal["assignment", "sinkhorn", "counter", "none"]
_MOST_ROUNDS = 20


def make_unique(quantised: Quantised, policy: Policy) -> tuple[Ragged, dict[str, int]]:
    """The codes of every item, int32, and how many items shared theirs after each stage.

    'counter' is one more code, which numbers the items of a group, as in TIGER (arXiv 2305.05065);
    other items have none. 'sinkhorn' gives the items that share their codes other last codes, as
    LC-Rec (arXiv 2311.09049) does, 'assignment' does it with the least distances; items that still
    share theirs then get a counter. 'none' leaves them.
    """
    codes_IxL = quantised.codes_IxL
    sharing = {"quantiser": int(_shared(codes_IxL)[0].size)}
    if requantise := {"sinkhorn": by_sinkhorn, "assignment": by_assignment}.get(policy):
        codes_IxL = requantise(quantised)
        sharing[policy] = int(_shared(codes_IxL)[0].size)
    counter_I = np.full(len(codes_IxL), -1, np.int32)
    if policy != "none":
        item_n, group_n = _shared(codes_IxL)
        counter_I[item_n] = np.arange(item_n.size) - np.searchsorted(group_n, group_n)
        sharing["counter"] = 0
    rows_IxL = np.concatenate([codes_IxL, counter_I[:, None]], axis=1)
    return Ragged.from_lengths(rows_IxL[rows_IxL >= 0], (rows_IxL >= 0).sum(axis=1)), sharing


def by_assignment(quantised: Quantised) -> np.ndarray:
    """int32 [I, L]: the codes, the last ones different for items whose others are the same.

    Where some items collide, all those with the same other codes get the last ones that have the
    least sum of squared distances (the Hungarian method). Of more than K items some keep theirs.
    """
    codes_IxL = quantised.codes_IxL.copy()
    *_, prefix_I = np.unique(codes_IxL[:, :-1], axis=0, return_inverse=True)
    item_n = np.flatnonzero(np.isin(prefix_I, prefix_I[_shared(codes_IxL)[0]]))
    item_n = item_n[np.argsort(prefix_I[item_n], kind="stable")]
    cost_nxK = np.asarray(squared_distances(quantised.last_IxE[item_n], quantised.last_KxE))
    starts = np.flatnonzero(np.diff(prefix_I[item_n], prepend=-1))[1:]
    for items, cost in zip(np.split(item_n, starts), np.split(cost_nxK, starts), strict=True):
        row, code = linear_sum_assignment(cost)
        codes_IxL[items[row], -1] = code
    return codes_IxL


def by_sinkhorn(quantised: Quantised) -> np.ndarray:
    """int32 [I, L]: the codes, the last one chosen by Sinkhorn's plan in groups that collide.

    Up to 20 rounds, as one may collide with another. Items with the same vector stay together.
    """
    codes_IxL = quantised.codes_IxL.copy()
    for _ in range(_MOST_ROUNDS):
        item_n, group_n = _shared(codes_IxL)
        if not item_n.size:
            break
        padding = (1 << int(item_n.size - 1).bit_length()) - item_n.size  # few sizes: few programs
        vectors_nxE = np.pad(quantised.last_IxE[item_n], [(0, padding), (0, 0)])
        group_n = np.pad(group_n, (0, padding), constant_values=len(vectors_nxE))
        code_n = np.asarray(_even_in_groups(vectors_nxE, quantised.last_KxE, group_n))
        codes_IxL[item_n, -1] = code_n[: item_n.size]
    return codes_IxL


def ids_of_codes(codes: Ragged, item_ids: Sequence[str]) -> SemanticIds:
    """Ids with tokens such as <a_183>: the level's letter, the code's number."""
    rows = (codes[item].tolist() for item in range(len(codes)))
    named = [[f"<{LEVELS[level]}_{code}>" for level, code in enumerate(row)] for row in rows]
    return SemanticIds.of(named, item_ids)


def _shared(codes_IxL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(items that share their codes, their groups 0, 1, ..), ordered by group, then by item."""
    _, group_I, size_G = np.unique(codes_IxL, axis=0, return_inverse=True, return_counts=True)
    item_n = np.flatnonzero(size_G[group_I] > 1)
    item_n = item_n[np.argsort(group_I[item_n], kind="stable")]
    return item_n, np.unique(group_I[item_n], return_inverse=True)[1].astype(np.int32)


@jax.jit
def _even_in_groups(vectors_nxE, codebook_KxE, group_n):
    """int32 [n]: codes spread evenly within each group."""
    cost_nxK = squared_distances(vectors_nxE, codebook_KxE)
    plan_nxK = sinkhorn(
        cost_nxK, group_n, len(group_n), epsilon=LAST_LEVEL_EPSILON, rounds=LAST_LEVEL_ROUNDS
    )
    return plan_nxK.argmax(axis=1).astype(jnp.int32)
