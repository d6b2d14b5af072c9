"""Prompts: titles tokenised once, concatenated, and cut by whole titles."""

import numpy as np
import pytest

from tca4rec_jax.data.prompts import (
    PromptTemplate,
    TextEncoder,
    check_vocabulary,
    keep_latest,
    prompts,
    row_tokens,
    tokenise_titles,
)
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.errors import UserError

TITLES = ("a", "bb", "ccc")
TEMPLATE = PromptTemplate(prefix="P:", before_title=" ", end="\n")


def encode(text):
    """One token per character."""
    return [ord(character) for character in text]


LETTERS = TextEncoder(encode, lambda text: encode("^" + text), {"</s>": 2, "é": ord("é")})


def decode(ids):
    return "".join(chr(i) for i in ids)


@pytest.fixture
def tokens():
    return tokenise_titles(TITLES, LETTERS, TEMPLATE)


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
        (("a", "Café"), TEMPLATE, "item 1: its title 'Café' contains é"),
        (("a",), PromptTemplate("P:", " ", "--"), "prompt.end '--' is 2 tokens .*control.*</s>"),
    ],
)
def test_bad_titles_and_templates_are_named(titles, template, message):
    with pytest.raises(ValueError, match=message):
        tokenise_titles(titles, LETTERS, template)


def test_a_control_token_may_end_titles(tokens):
    ended = tokenise_titles(TITLES, LETTERS, PromptTemplate("P:", " ", "</s>"))
    assert [ids[-1] for ids in (ended.titles[0], ended.titles[1])] == [2, 2]
    assert decode(ended.titles[1][:-1]) == " bb"


def test_tokens_beyond_the_vocabulary_are_named(tokens):
    check_vocabulary(tokens, ("x", "y", "z"), ord("c") + 1)
    with pytest.raises(UserError, match="item 'z' has token 99, .* vocabulary is 99 tokens: its"):
        check_vocabulary(tokens, ("x", "y", "z"), ord("c"))
    letters = TextEncoder(encode, lambda text: encode("~" + text))
    with pytest.raises(UserError, match=r"prompt\.prefix has token 126"):
        check_vocabulary(tokenise_titles(TITLES, letters, TEMPLATE), ("x", "y", "z"), 126)


def test_an_empty_history_is_an_error(tokens):
    with pytest.raises(ValueError, match="row 1 has an empty history"):
        prompts(tokens, np.array([[0, 1], [-1, -1]]), budget=50)


def test_ragged_pad_and_take():
    ragged = Ragged.from_lengths(np.array([1, 2, 3, 4]), np.array([1, 0, 3]))
    assert ragged.pad(np.array([2, 1]), 4, -1).tolist() == [[2, 3, 4, -1], [-1, -1, -1, -1]]
    assert ragged.take(np.array([2, 0])).values.tolist() == [2, 3, 4, 1]
    with pytest.raises(ValueError, match="row 2 has 3 entries"):
        ragged.pad(np.array([2]), 2, 0)
