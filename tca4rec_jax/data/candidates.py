"""Candidates: a row's target among items that were drawn (LLaRA's protocol, arXiv 2312.02445).

Axis letters: R rows, N candidates, I items.
"""

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError


def draw_candidates(
    histories: Ragged,
    target_R: np.ndarray,
    allowed_I: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """int32 [R, N]: of each row its target and N - 1 items outside its history, shuffled.

    The others are drawn from the allowed items (bool), each as likely as any. Raises UserError for
    a row with fewer of them.
    """
    pool = np.flatnonzero(allowed_I)
    candidates_RxN = np.empty((len(target_R), count), np.int32)
    for row, target in enumerate(target_R):
        taken = {*histories[row].tolist(), int(target)}
        drawn = rng.choice(pool, min(count - 1 + len(taken), pool.size), replace=False)
        others = [item for item in drawn.tolist() if item not in taken][: count - 1]
        if len(others) < count - 1:
            raise UserError(
                f"row {row} has {len(others)} allowed items outside its history besides its "
                f"target, too few for {count} candidates"
            )
        candidates_RxN[row] = rng.permutation([*others, target])
    return candidates_RxN
