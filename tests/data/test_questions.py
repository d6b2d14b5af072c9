"""Questions about an item against texts put together by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tca4rec_jax.data.item_tokens import TextEncoder
from tca4rec_jax.data.prompts import USER_SLOT
from tca4rec_jax.data.questions import NO, YES, Asked, asked_of, question_rows, tokenise_questions
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError

TITLES = ("ab", "c", "de", "f")
LETTERS = TextEncoder(*2 * [lambda text: [ord(c) for c in text]], {"~": 300}, ("~",))
HISTORY = Ragged.from_lengths(np.array([0, 1, 2, 3, 3], np.int32), np.array([3, 1, 1]))
ASKED = Asked(
    HISTORY,
    np.array([True, False, True, False, True]),
    np.array([3, 0, 1], np.int32),
    np.array([YES, NO, YES], np.int32),
)


def template(text, **fields):
    fields = {"item": "<{title}>", "separator": ",", "max_tokens": 99} | fields
    return PromptTemplate((text,), **fields)


def texts(template, asked=ASKED, *, with_answers=True):
    items = tokenise_questions({"title": TITLES}, LETTERS, template, ("y", "no"))
    rows = question_rows(items, asked, template, with_answers=with_answers)
    tokens = rows.prompts.tokens
    words = ["".join("~" if t == 300 else chr(t) for t in tokens[r]) for r in range(len(tokens))]
    starts = rows.starts.values.tolist()
    assert all(w[s:] in ("y", "no", "") for w, s in zip(words, starts, strict=True))
    return words, [rows.prompts.slots[r].tolist() for r in range(len(tokens))]


def test_liked_and_disliked_items_stand_in_lists_of_their_own():
    words, slots = texts(template("L:{liked}. D:{disliked}. {item}?{target}"))
    assert words == ["L:<ab>,<de>. D:<c>. <f>?y", "L:. D:<f>. <ab>?no", "L:<f>. D:. <c>?y"]
    assert slots == [[], [], []]
    without, _ = texts(template("L:{liked}. D:{disliked}. {item}?{target}"), with_answers=False)
    assert without == ["L:<ab>,<de>. D:<c>. <f>?", "L:. D:<f>. <ab>?", "L:<f>. D:. <c>?"]


def test_placeholders_carry_the_user_and_the_items():
    words, slots = texts(template("u{user}v{vector}:{history};{item}{vector}?{target}"))
    assert words[0] == "u~v~:<ab>,<c>,<de>;<f>~?y"
    assert slots == [[USER_SLOT, 3, 3], [USER_SLOT, 0, 0], [USER_SLOT, 1, 1]]
    words, slots = texts(template("{user}{history};{item}?{target}", item="{title}{vector}"))
    assert words[0] == "~ab~,c~,de~;f~?y"
    assert slots[0] == [USER_SLOT, 0, 1, 2, 3]


def test_the_latest_items_that_fit_are_kept():
    text = "{history};{item}?{target}"
    (whole, *_), _ = texts(template(text))
    shorter = template(text, max_tokens=len(whole) + 1)  # "no" is the longest answer
    assert texts(shorter)[0][0] == "<c>,<de>;<f>?y"
    first = "Say y or no. "  # charged once, although three fields follow it
    shorter = template(first + text, max_tokens=len(first) + len(whole) + 1)
    assert texts(shorter)[0][0] == first + "<c>,<de>;<f>?y"
    with pytest.raises(UserError, match="row 1 needs 8 tokens without a history, the budget is 7"):
        texts(template(text, max_tokens=7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{liked};{item}?", "at its end"),
        ("{item};{history}?{target}", "expected {history}, or {liked}"),
        ("{history}{liked};{item}?{target}", "expected {history}, or {liked}"),
        ("{item}?{target}", "expected {history}, or {liked}"),
        ("{history}{item}{brand}{target}", "{brand}: the fields known"),
    ],
)
def test_other_templates_are_refused(text, message):
    with pytest.raises(UserError) as refused:
        template(text)
    assert message in str(refused.value)


def test_what_does_not_go_together_is_refused():
    asked = ASKED._replace(liked=None)
    with pytest.raises(UserError, match=r"{liked}, but the data have no ratings"):
        texts(template("{liked};{item}?{target}"), asked)
    with pytest.raises(UserError, match=r"expected one of prompt.templates, with {item}"):
        texts(template("{history};{target}"))
    with pytest.raises(UserError, match=r"recommender.answers is \('n', 'no'\)"):
        tokenise_questions(
            {"title": TITLES}, LETTERS, template("{history}{item}{target}"), ("n", "no")
        )


def sequences(liked=None):
    rows = ([0, 1, 2], [3, 0], [1, 2, 3, 0] * 8)
    offsets = np.cumsum([0, *map(len, rows)])
    items = np.concatenate(rows)
    return ItemSequences(np.arange(3), items, offsets, np.full(items.size, -1), liked)


def test_ratings_are_the_answers():
    liked = np.zeros(37, bool)
    liked[[0, 4, 36]] = True
    asked = asked_of(sequences(liked), 3, 4, seed=0)
    assert asked.item_R.tolist() == [2, 0, 0]
    assert asked.answer_R.tolist() == [NO, YES, YES]
    assert [asked.history[row].tolist() for row in range(3)] == [[0, 1], [3], [1, 2, 3]]
    assert asked.liked.tolist() == [True, False, False, False, False, False]
    some = asked.take(np.array([2, 0]))
    assert some.history.values.tolist() == [1, 2, 3, 0, 1]
    assert some.liked.tolist() == [False] * 3 + [True, False]


def test_without_ratings_another_item_is_asked_about_and_the_answer_is_no():
    split = sequences().take(np.array([0, 1] * 50))
    asked = asked_of(split, 3, 4, seed=0)
    no_R = asked.answer_R == NO
    assert 30 < no_R.sum() < 70
    assert (asked.item_R[~no_R] == split.items[split.last_positions][~no_R]).all()
    for row in np.flatnonzero(no_R).tolist():
        assert asked.item_R[row] not in split[row]
    np.testing.assert_array_equal(asked_of(split, 3, 4, seed=0).item_R, asked.item_R)


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=4))
def test_another_item_is_any_of_those_that_a_row_lacks_equally_likely(rows):
    rows, draws = [row for row in rows if len(set(row)) < 7] or [[0]], 2000
    offsets, items = np.cumsum([0, *map(len, rows)]), np.concatenate(rows)
    user = np.arange(len(rows))
    split = ItemSequences(user, items, offsets, np.full(items.size, -1))
    split = split.take(np.repeat(user, draws))
    asked = asked_of(split, 3, 7, seed=0)
    no_R = (asked.answer_R == NO).reshape(len(rows), draws)
    for row, drawn_R, no in zip(rows, asked.item_R.reshape(len(rows), draws), no_R, strict=True):
        others = sorted({*range(7)} - {*row})
        counts = np.bincount(drawn_R[no], minlength=7)
        assert np.flatnonzero(counts).tolist() == others
        expected = no.sum() / len(others)
        assert (np.abs(counts[others] - expected) < 6 * np.sqrt(expected)).all()
