"""What a CF model takes from the training data without gradients: counts, graphs, item weights.

Axis letters: n flat positions, U users, I items, E distinct (user, item) pairs.
"""

import numpy as np
from flax import nnx

from tca4rec_jax.cf.windows import users_of
from tca4rec_jax.data.sequences import ItemSequences


class Observed(nnx.Variable):
    """A constant made by a model's `observe`; saved in checkpoints, never trained."""


def user_item_pairs(sequences: ItemSequences) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (user 0..U-1, item) pairs, sorted by user, then item: int32 [E] each."""
    pairs = np.unique(np.stack([users_of(sequences), sequences.items]), axis=1)
    return pairs[0], pairs[1]
