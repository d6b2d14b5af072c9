"""The sizes of prepared data, counted some rows at a time."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, RecData
from tca4rec_jax.data.windows import MadeData, RowSource, parts_of


def summarise(data: RecData | MadeData) -> dict:
    """{'items', 'distinct_titles', 'splits': {name: counts}}, JSON-able.

    Of a split's rows, tied is the share whose target shares its time with the item before it (None
    if the data have no two times in a row),
    repeated that whose target is among the items before it, seen_users and seen_items those whose
    user and target are in train_sequences.
    """
    seen = seen_of(data.splits["train_sequences"], data.catalogue.num_items)
    counts = {name: counts_of(data.splits[name], *seen) for name in SPLITS}
    return summary_of(data.catalogue, counts)


def summary_of(catalogue: Catalogue, counts: Mapping[str, Mapping[str, int]]) -> dict:
    """`summarise` of what `counts_of` gives of every split."""
    return {
        "items": catalogue.num_items,
        "distinct_titles": len(set(catalogue.titles)),
        "splits": {name: _shares(of) for name, of in counts.items()},
    }


def seen_of(trained: RowSource, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The users (int, ascending) and which of the items (bool [I]) have rows to train on."""
    users, seen_I = [np.empty(0, np.int32)], np.zeros(items, bool)
    for part in parts_of(trained) if len(trained) else ():
        users.append(np.unique(part.user))
        seen_I[part.items] = True
    return np.unique(np.concatenate(users)), seen_I


def counts_of(rows: RowSource, seen_U: np.ndarray, seen_I: np.ndarray) -> Counter[str]:
    """What the shares of a split are made of; those of parts with other users add up."""
    counts: Counter[str] = Counter()
    users = [np.empty(0, np.int32)]
    for part in parts_of(rows) if len(rows) else ():
        target_R = part.items[part.last_positions]
        is_target = part.items == np.repeat(target_R, part.lengths)
        times_R = np.add.reduceat(is_target, part.offsets[:-1], dtype=np.int64)
        counts["repeated"] += int((times_R > 1).sum())  # once as the target itself
        counts["tied"] += int(part.tied.sum())
        counts["timed"] += part.has_times
        counts["seen_users"] += int(np.isin(part.user, seen_U).sum())
        counts["seen_items"] += int(seen_I[target_R].sum())
        counts["interactions"] += len(part.items)
        users.append(np.unique(part.user))
    counts["rows"] = len(rows)
    counts["users"] = len(np.unique(np.concatenate(users)))
    return counts


def _shares(counts: Mapping[str, int]) -> dict[str, int | float | None]:
    rows = counts["rows"]
    return {
        "rows": rows,
        "users": counts["users"],
        "interactions": counts["interactions"],
        "mean_length": counts["interactions"] / rows,
        "tied": counts["tied"] / rows if counts["timed"] else None,
        "repeated": counts["repeated"] / rows,
        "seen_users": counts["seen_users"] / rows,
        "seen_items": counts["seen_items"] / rows,
    }
