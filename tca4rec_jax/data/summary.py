"""The sizes of prepared data, counted some rows at a time."""

import numpy as np

from tca4rec_jax.data.sequences import SPLITS, RecData
from tca4rec_jax.data.windows import MadeData, RowSource, parts_of


def summarise(data: RecData | MadeData) -> dict:
    """{'items', 'distinct_titles', 'splits': {name: counts}}, JSON-able.

    Of a split's rows, tied is the share whose target shares its time with the item before it (None
    if the data have no two times in a row),
    repeated that whose target is among the items before it, seen_users and seen_items those whose
    user and target are in train_sequences.
    """
    seen_U, seen_I = _seen(data.splits["train_sequences"], data.catalogue.num_items)
    return {
        "items": data.catalogue.num_items,
        "distinct_titles": len(set(data.catalogue.titles)),
        "splits": {name: _counts(data.splits[name], seen_U, seen_I) for name in SPLITS},
    }


def _seen(trained: RowSource, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The users (int, ascending) and which of the items (bool [I]) have rows to train on."""
    users, seen_I = [], np.zeros(items, bool)
    for part in parts_of(trained):
        users.append(np.unique(part.user))
        seen_I[part.items] = True
    return np.unique(np.concatenate(users)), seen_I


def _counts(
    rows: RowSource, seen_U: np.ndarray, seen_I: np.ndarray
) -> dict[str, int | float | None]:
    tied = repeated = seen_users = seen_items = items = 0
    users, timed = [], False
    for part in parts_of(rows):
        target_R = part.items[part.last_positions]
        is_target = part.items == np.repeat(target_R, part.lengths)
        times_R = np.add.reduceat(is_target, part.offsets[:-1], dtype=np.int64)
        repeated += int((times_R > 1).sum())  # once as the target itself
        tied += int(part.tied.sum())
        timed |= part.has_times
        seen_users += int(np.isin(part.user, seen_U).sum())
        seen_items += int(seen_I[target_R].sum())
        items += len(part.items)
        users.append(np.unique(part.user))
    count = len(rows)
    return {
        "rows": count,
        "users": len(np.unique(np.concatenate(users))),
        "interactions": items,
        "mean_length": items / count,
        "tied": tied / count if timed else None,
        "repeated": repeated / count,
        "seen_users": seen_users / count,
        "seen_items": seen_items / count,
    }
