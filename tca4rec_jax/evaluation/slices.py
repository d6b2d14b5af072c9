"""Slices of the evaluated rows: by item, user, history and time.

Axis letters: R rows, I items.
"""

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences

HEAD = 0.2
"""The share of the items, the most popular ones, that are the head."""
LEAST_USERS = 10
"""A slice of fewer has no interval that means anything: users are what is drawn."""
LENGTHS = (0, 5, 10, 20, 50)
"""The least numbers of history items of the slices by length."""


def slices(
    rows: ItemSequences, histories: Ragged, train: ItemSequences, num_items: int
) -> dict[str, np.ndarray]:
    """{slice: bool [R]} of the rows, targets last, with these whole histories before them.

    By what is in `train` (train_sequences): a warm item or user occurs in it, a cold one does not;
    the head are the HEAD share of the items with the most interactions in it (of two with as many,
    the earlier in the catalogue), the tail are the rest. By length of the history; by whether the
    target shares its time with the item before (tied); by whether it is in the history (seen). A
    slice that holds all rows is left out, and one of fewer than LEAST_USERS users.
    """
    target_R = rows.items[rows.last_positions]
    count_I = np.bincount(train.items, minlength=num_items)
    of_row_n = histories.row_of(np.arange(histories.values.size))
    seen_n = histories.values == target_R[of_row_n]
    seen_R = np.bincount(of_row_n, seen_n, minlength=len(rows)) > 0
    pairs = {
        ("warm item", "cold item"): count_I[target_R] > 0,
        ("warm user", "cold user"): np.isin(rows.user, train.user),
        ("head", "tail"): head_items(count_I)[target_R],
        ("tied", "untied"): rows.tied,
        ("seen before", "not seen before"): seen_R,
    }
    found = {
        name: inside_R
        for (yes, no), yes_R in pairs.items()
        for name, inside_R in ((yes, yes_R), (no, ~yes_R))
    }
    found |= by_length(histories.lengths)
    return {
        name: inside_R
        for name, inside_R in found.items()
        if not inside_R.all() and len(np.unique(rows.user[inside_R])) >= LEAST_USERS
    }


def head_items(count_I: np.ndarray) -> np.ndarray:
    """bool [I]: the head, of items with so many interactions."""
    head_I = np.zeros(len(count_I), bool)
    head_I[np.argsort(-count_I, kind="stable")[: round(HEAD * len(count_I))]] = True
    return head_I


def by_length(length_R: np.ndarray) -> dict[str, np.ndarray]:
    """{slice: bool [R]} of rows whose histories have so many items."""
    which_R, found = np.searchsorted(LENGTHS, length_R, side="right") - 1, {}
    for number, least in enumerate(LENGTHS):
        following = LENGTHS[number + 1 : number + 2]
        until = f"to {following[0] - 1}" if following else "or more"
        found[f"history {least} {until}"] = which_R == number
    return found
