"""The catalogue of the tests' tiny random decoder: its titles are the oracle's words."""

import copy

import oracle

SEQUENCES = oracle.with_end(oracle.WORDS)
TITLES = [" ".join(map(str, word)) for word in oracle.WORDS]
IDS = [f"i{item}" for item in range(len(TITLES))]
BOUGHT = [0, 1, 2, 3, 3, 3, 9, 9]


def changed(experiment, **parts):
    """The experiment with other parts."""
    other = copy.copy(experiment)
    vars(other).pop("item_filter", None)  # is made of other parts
    vars(other).update(parts)
    return other
