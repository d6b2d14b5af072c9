"""Prompts: titles tokenised once, concatenated, and cut by whole titles."""

import numpy as np
import pytest

from tca4rec_jax.data.prompts import (
    PromptTemplate,
    keep_latest,
    prompts,
    row_tokens,
    tokenise_titles,
)
from tca4rec_jax.data.ragged import Ragged

TITLES = ("a", "bb", "ccc")
TEMPLATE = PromptTemplate(prefix="P:", before_title=" ", end="\n")


def encode(text):
    """One token per character."""
    return [ord(character) for character in text]


def decode(ids):
    return "".join(chr(i) for i in ids)


@pytest.fixture
def tokens():
    return tokenise_titles(TITLES, encode, TEMPLATE, bos=ord("^"))


def test_rows_are_prefix_and_titles(tokens):
    items = Ragged.from_lengths(np.array([0, 2, 1]), np.array([2, 1]))
    rows, starts = row_tokens(tokens, items)
    assert [decode(row) for row in (rows[0], rows[1])] == ["^P: a\n ccc\n", "^P: bb\n"]
    assert starts[0].tolist() == [3, 6]
    assert starts[1].tolist() == [3]


def test_prompts_drop_the_oldest_titles_whole(tokens):
    history = np.array([[0, 2, 1], [-1, -1, 0]])
    full = prompts(tokens, history, budget=100)
    assert decode(full[0]) == "^P: a\n ccc\n bb\n"
    assert decode(full[1]) == "^P: a\n"
    cut = prompts(tokens, history, budget=len("^P: ccc\n bb\n"))
    assert decode(cut[0]) == "^P: ccc\n bb\n"
    assert decode(cut[1]) == "^P: a\n"


def test_a_budget_that_cannot_hold_the_target_is_named(tokens):
    items = Ragged.from_lengths(np.array([0, 1, 2]), np.array([1, 2]))
    assert keep_latest(tokens, items, budget=20, reserve=2).lengths.tolist() == [1, 2]
    with pytest.raises(ValueError, match="row 1 needs 12 tokens"):
        keep_latest(tokens, items, budget=11, reserve=2)


@pytest.mark.parametrize(
    ("titles", "template", "message"),
    [
        (("a", "  "), TEMPLATE, "item 1 has an empty title"),
        (("a", "b\nc"), TEMPLATE, "item 1: its title"),
        (("a",), PromptTemplate("P:", " ", "--"), "prompt.end '--' is 2 tokens"),
    ],
)
def test_bad_titles_and_templates_are_named(titles, template, message):
    with pytest.raises(ValueError, match=message):
        tokenise_titles(titles, encode, template, bos=None)


def test_an_empty_history_is_an_error(tokens):
    with pytest.raises(ValueError, match="row 1 has an empty history"):
        prompts(tokens, np.array([[0, 1], [-1, -1]]), budget=50)


def test_ragged_pad_and_take():
    ragged = Ragged.from_lengths(np.array([1, 2, 3, 4]), np.array([1, 0, 3]))
    assert ragged.pad(np.array([2, 1]), 4, -1).tolist() == [[2, 3, 4, -1], [-1, -1, -1, -1]]
    assert ragged.take(np.array([2, 0])).values.tolist() == [2, 3, 4, 1]
    with pytest.raises(ValueError, match="row 2 has 3 entries"):
        ragged.pad(np.array([2]), 2, 0)
