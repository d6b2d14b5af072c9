"""The counts of data in summary.json, of small data by hand."""

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData
from tca4rec_jax.data.summary import summarise


def test_summary_counts(tmp_path):
    def split(users, rows, times):
        return ItemSequences(
            np.array(users),
            np.concatenate(rows),
            np.cumsum([0, *map(len, rows)]),
            np.concatenate(times),
        )

    train = split([0, 1], [[0, 1], [1, 0]], [[1, 1], [1, 2]])
    test = split([1, 2], [[0, 1, 0], [2, 1]], [[1, 3, 4], [5, 5]])
    data = RecData(
        Catalogue(("a", "b", "c"), ("A", "B", "A")),
        {"train_sequences": train, "train": train, "validation": train, "test": test},
    )
    summary = summarise(data)
    assert (summary["items"], summary["distinct_titles"]) == (3, 2)
    assert summary["splits"]["test"] == {
        "rows": 2,
        "users": 2,
        "interactions": 5,
        "mean_length": 2.5,
        "tied": 0.5,
        "repeated": 0.5,
        "seen_users": 0.5,
        "seen_items": 1.0,
    }


def test_ties_are_unknown_where_only_the_targets_have_a_time():
    rows = ItemSequences([0, 0], [0, 1, 1, 0], [0, 2, 4], [-1, 5, -1, 5])
    data = RecData(Catalogue(("a", "b"), ("A", "B")), dict.fromkeys(SPLITS, rows))
    assert {counts["tied"] for counts in summarise(data)["splits"].values()} == {None}
