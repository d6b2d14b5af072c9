"""Windows: the most recent items before a position, for every position of ItemSequences.

A *flat position* j is an index into `ItemSequences.items`. Its window holds the up to S items that
precede it in its own row, oldest first, left padded with PAD_ITEM; the item at j is what a model
predicts from the window.

Axis letters: B batch of positions, S history length, L = S + 1, n flat positions, P supervised
positions of a window, W windows, I items, D width, E (user, item) pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.ragged import ranges
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError


class FlatRows(NamedTuple):
    """ItemSequences on the device, int32."""

    items_n: jax.Array
    row_starts_n: jax.Array  # the first flat position of each position's row
    user_n: jax.Array  # 0..U-1 in the order of ItemSequences.user

    @classmethod
    def of(cls, sequences: ItemSequences) -> "FlatRows":
        """The arrays of sequences; raises UserError if their positions are too many for int32."""
        count = len(sequences.items)
        if count > np.iinfo(np.int32).max:
            raise UserError(f"{count} flat positions are more than int32 can index; split the rows")
        starts_n = np.repeat(sequences.offsets[:-1], sequences.lengths).astype(np.int32)
        return cls(*map(jnp.asarray, (sequences.items, starts_n, users_of(sequences))))


class HistoryWindows(NamedTuple):
    """What a CF model is trained on: the windows before B flat positions, int32.

    Histories are left padded with PAD_ITEM. Targets are the items after each one of the window, in
    the last column the one at the flat position; the first is predicted from an empty history, and
    PAD_ITEM before it from nothing. The users are for models that know them by id.
    """

    history_BxS: jax.Array
    target_BxS: jax.Array
    user_B: jax.Array


class TrainingQueries(NamedTuple):
    """What a CF model answers in training: logit = vector . item row + bias."""

    vector_BxPxD: jax.Array  # float32
    target_BxP: jax.Array  # int32, the item to score highest; PAD_ITEM: not supervised
    items: CFItems


def windows_at(rows: FlatRows, position_B: jax.Array, history_length: int) -> HistoryWindows:
    """The windows of the given flat positions; traceable."""
    flat_BxL = position_B[:, None] + np.arange(-history_length, 1)[None, :]
    inside_BxL = flat_BxL >= rows.row_starts_n[position_B][:, None]
    item_BxL = jnp.where(inside_BxL, rows.items_n[jnp.maximum(flat_BxL, 0)], PAD_ITEM)
    return HistoryWindows(item_BxL[:, :-1], item_BxL[:, 1:], rows.user_n[position_B])


def cut_rows(sequences: ItemSequences, history_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows in which every item is a target once: int64 [W] each.

    Rows are cut from their ends. Returns the flat positions at which windows end, and how many
    targets each has, history_length but in the first window of a row.
    """
    counts_R = -(-sequences.lengths // history_length)
    from_end_W = ranges(np.zeros_like(counts_R), counts_R) * history_length
    end_W = np.repeat(sequences.last_positions, counts_R) - from_end_W
    start_W = np.repeat(sequences.offsets[:-1], counts_R)
    return end_W, np.minimum(end_W - start_W + 1, history_length)


def users_of(sequences: ItemSequences) -> np.ndarray:
    """The user of each flat position as 0..U-1, int32 [n]."""
    _, user_R = np.unique(sequences.user, return_inverse=True)
    return np.repeat(user_R, sequences.lengths).astype(np.int32)


def user_item_pairs(sequences: ItemSequences) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (user 0..U-1, item) pairs, sorted by user, then item: int32 [E] each."""
    pairs = np.unique(np.stack([users_of(sequences), sequences.items]), axis=1)
    return pairs[0], pairs[1]
