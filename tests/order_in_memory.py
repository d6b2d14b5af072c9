"""The order of interactions in time, by sorts in memory: what the package's sort must equal."""

import numpy as np
import pandas as pd


def order_by_time(given, seed=0, ties="shuffled"):
    """Sorted by time; at one moment shuffled by `seed`, whatever the order of the file, or
    'numbered': by user and item as they first occur in the order of times, users and items."""
    if not given.has_times:
        return given
    canonical = given.take(np.lexsort((given.item, given.user, given.timestamp)))
    if ties == "numbered":
        user_n, item_n = (pd.factorize(one)[0] for one in (canonical.user, canonical.item))
        return canonical.take(np.lexsort((item_n, user_n, canonical.timestamp)))
    shuffled = canonical.take(np.random.default_rng(seed).permutation(len(given.user)))
    return shuffled.take(np.argsort(shuffled.timestamp, kind="stable"))
