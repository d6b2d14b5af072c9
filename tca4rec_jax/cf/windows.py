"""Windows: the most recent items before a position, for every position of ItemSequences.

A *flat position* j is an index into `ItemSequences.items`. Its window holds the up to S items that
precede it in its own row, oldest first, left padded with PAD_ITEM; the item at j is what a model
predicts from the window.

Axis letters: B batch of positions, S history length, n flat positions.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences


def row_starts(sequences: ItemSequences) -> np.ndarray:
    """The first flat position of the row that each flat position belongs to, int32 [n].

    Raises:
      ValueError: more flat positions than int32 can index.
    """
    if len(sequences.items) > np.iinfo(np.int32).max:
        raise ValueError(
            f"{len(sequences.items)} flat positions are more than int32 can index; split the rows"
        )
    return np.repeat(sequences.offsets[:-1], sequences.lengths).astype(np.int32)


def windows_before(
    items_n: jax.Array, row_starts_n: jax.Array, position_B: jax.Array, history_length: int
) -> jax.Array:
    """The window before each position, int32 [B, history_length]; traceable."""
    return _gather(items_n, row_starts_n, position_B, np.arange(-history_length, 0))


def targets_of_windows(
    items_n: jax.Array, row_starts_n: jax.Array, position_B: jax.Array, history_length: int
) -> jax.Array:
    """The item that follows each place of the window, int32 [B, history_length]; traceable.

    The last column is the item at the position itself. PAD_ITEM where the place is so far to the
    left that the item after it is padding too: nothing is predicted there. The place just before
    a row's first item predicts that item from an empty history.
    """
    return _gather(items_n, row_starts_n, position_B, np.arange(1 - history_length, 1))


def _gather(items_n, row_starts_n, position_B, shift_S):
    flat_BxS = position_B[:, None] + shift_S[None, :]
    inside_BxS = flat_BxS >= row_starts_n[position_B][:, None]
    return jnp.where(inside_BxS, items_n[jnp.maximum(flat_BxS, 0)], PAD_ITEM)
