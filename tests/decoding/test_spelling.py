"""What is spelt like a name: against the definition, and in parts."""

import numpy as np
import pytest

from tca4rec_jax.decoding import spelling


def similarity(a, b):
    """Twice the length of the longest common subsequence over both lengths, in percent."""
    common = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, one in enumerate(a, 1):
        for j, other in enumerate(b, 1):
            longer = max(common[i - 1, j], common[i, j - 1])
            common[i, j] = common[i - 1, j - 1] + 1 if one == other else longer
    return 200 * common[-1, -1] / (len(a) + len(b))


@pytest.mark.parametrize("at_once", [7, 1000])
def test_the_three_most_similar_are_named(at_once, monkeypatch):
    monkeypatch.setattr(spelling, "_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    titles = ["".join(rng.choice([*"abcd "], rng.integers(3, 9))) for _ in range(60)]
    for name in ("abcd", "dd aa", "zzzz"):
        best = sorted((similarity(name, title) for title in titles), reverse=True)[:3]
        said = spelling.hint(name, titles)
        named = said.removeprefix("; did you mean ").removesuffix("?").split(" or ")
        found = [similarity(name, one.strip("'")) for one in named] if said else []
        assert found == [one for one in best if one >= 50]


def test_a_name_of_megabytes_is_neither_compared_nor_shown():
    assert spelling.hint("Fargo" * 1_000_000, ["Fargo" * 40, "Heat"]).count("Fargo") == 40
    assert len(spelling.shown("Fargo" * 1_000_000)) == 203
    assert spelling.shown("Fargo") == "'Fargo'"
