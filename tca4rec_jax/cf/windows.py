"""Windows: the most recent items before a position, for every position of ItemSequences.

A *flat position* j is an index into `ItemSequences.items`. Its window holds the up to S items that
precede it in its own row, oldest first, left padded with PAD_ITEM; the item at j is what a model
predicts from the window.

Axis letters: B batch of positions, S history length, n flat positions, P supervised positions of a
window, I items, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError


class FlatRows(NamedTuple):
    """ItemSequences on the device.

    Attributes:
      items_n: int32 [n].
      row_starts_n: int32 [n], the first flat position of each position's row.
      user_n: int32 [n], its user, 0..U-1 in the order of ItemSequences.user.
    """

    items_n: jax.Array
    row_starts_n: jax.Array
    user_n: jax.Array

    @classmethod
    def of(cls, sequences: ItemSequences) -> "FlatRows":
        """The arrays of sequences; raises as row_starts."""
        arrays = (sequences.items, row_starts(sequences), users_of(sequences))
        return cls(*(jnp.asarray(array) for array in arrays))


class HistoryWindows(NamedTuple):
    """What a CF model is trained on: the windows before B flat positions.

    Attributes:
      history_BxS: int32, left padded with PAD_ITEM.
      target_BxS: int32, the item after each one of the window (the last column: the item at the
        flat position), PAD_ITEM where there is nothing to predict.
      user_B: int32, only for models that know users by id.
    """

    history_BxS: jax.Array
    target_BxS: jax.Array
    user_B: jax.Array


class TrainingQueries(NamedTuple):
    """What a CF model answers in training: logit = vector . item row + bias.

    Attributes:
      vector_BxPxD: float32.
      target_BxP: int32, the item each vector should score highest; PAD_ITEM: not supervised.
      items: float32 table [I, D], and the bias [I] or None.
    """

    vector_BxPxD: jax.Array
    target_BxP: jax.Array
    items: CFItems


def windows_at(rows: FlatRows, position_B: jax.Array, history_length: int) -> HistoryWindows:
    """The windows of the given flat positions; traceable."""
    at = (rows.items_n, rows.row_starts_n, position_B, history_length)
    return HistoryWindows(windows_before(*at), targets_of_windows(*at), rows.user_n[position_B])


def users_of(sequences: ItemSequences) -> np.ndarray:
    """The user of each flat position as 0..U-1, int32 [n]."""
    _, user_R = np.unique(sequences.user, return_inverse=True)
    return np.repeat(user_R, sequences.lengths).astype(np.int32)


def user_item_pairs(sequences: ItemSequences) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (user 0..U-1, item) pairs, sorted by user, then item: int32 [E] each."""
    pairs = np.unique(np.stack([users_of(sequences), sequences.items]), axis=1)
    return pairs[0], pairs[1]


def row_starts(sequences: ItemSequences) -> np.ndarray:
    """The first flat position of the row that each flat position belongs to, int32 [n].

    Raises:
      UserError: more flat positions than int32 can index.
    """
    if len(sequences.items) > np.iinfo(np.int32).max:
        raise UserError(
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
    """The item that follows each one of the window, int32 [B, history_length]; traceable.

    The last column is the item at the flat position. PAD_ITEM where the next item is padding too:
    nothing is predicted there. The padding just before a row's first item predicts that item from
    an empty history.
    """
    return _gather(items_n, row_starts_n, position_B, np.arange(1 - history_length, 1))


def _gather(items_n, row_starts_n, position_B, shift_S):
    flat_BxS = position_B[:, None] + shift_S[None, :]
    inside_BxS = flat_BxS >= row_starts_n[position_B][:, None]
    return jnp.where(inside_BxS, items_n[jnp.maximum(flat_BxS, 0)], PAD_ITEM)
