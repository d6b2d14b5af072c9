"""Prompts: items tokenised once, concatenated, and cut by whole items."""

from dataclasses import replace

import numpy as np
import pytest

from tca4rec_jax.data.item_tokens import TextEncoder, check_vocabulary, tokenise_items
from tca4rec_jax.data.prompts import USER_SLOT, check_sequences, keep_latest, prompts, row_tokens
from tca4rec_jax.data.questions import tokenise_questions
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError

COLUMNS = {"title": ("a", "bb", "ccc"), "brand": ("Xy", "", "Zz")}
TEMPLATE = PromptTemplate(("P:{history}\n{target}",))


def encode(text):
    """One token per character."""
    return [ord(character) for character in text]


CONTROL = {"</s>": 2, "é": ord("é"), "<spare>": 4, "<reserved_1>": 5}
LETTERS = TextEncoder(encode, lambda text: encode("^" + text), CONTROL, ("<reserved_1>", "<spare>"))
SHOWN = {2: "</s>", 5: "#", 4: "?"}


def decode(ids):
    return "".join(SHOWN.get(i, chr(i)) for i in ids)


def tokenise(titles=COLUMNS["title"], **changes):
    columns = COLUMNS | {"title": titles}
    return tokenise_items(columns, LETTERS, replace(TEMPLATE, **changes))


def rows_of(tokens, *rows, template=0):
    """The text and the slots of rows of items, the last of each its target."""
    items = Ragged.from_lengths(np.concatenate(rows), np.array(list(map(len, rows))))
    found = row_tokens(tokens, items, np.full(len(rows), template))
    ids, slots = found.prompts
    texts = [decode(ids[row]) for row in range(len(rows))]
    return texts, [slots[row].tolist() for row in range(len(rows))], found.starts


def test_rows_are_what_they_were_when_every_title_had_its_own_end():
    """prefix, then ` title\\n` for every item, each tokenised on its own: the default template."""
    tokens = tokenise()
    texts, slots, starts = rows_of(tokens, [0, 2, 1], [1, 0])
    assert texts == ["^P: a\n ccc\n bb\n", "^P: bb\n a\n"]
    assert slots == [[], []]
    assert [starts[0].tolist(), starts[1].tolist()] == [[3, 6, 11], [3, 7]]
    check_sequences(tokens)
    without = tokenise_items({"title": ("a",)}, LETTERS, PromptTemplate())
    assert rows_of(without, [0, 0])[0] == ["^ a\n a\n"]


def test_prompts_drop_the_oldest_items_whole():
    tokens = tokenise()
    history = np.array([[0, 2, 1], [-1, -1, 0]])
    full = prompts(tokens, history, budget=100).tokens
    assert decode(full[0]) == "^P: a\n ccc\n bb\n"
    assert decode(full[1]) == "^P: a\n"
    cut = prompts(tokens, history, budget=len("^P: ccc\n bb\n")).tokens
    assert decode(cut[0]) == "^P: ccc\n bb\n"
    assert decode(cut[1]) == "^P: a\n"
    cut = prompts(tokens, history, budget=len("^P: ccc\n bb\n") - 1).tokens
    assert decode(cut[0]) == "^P: bb\n"


def test_a_budget_that_cannot_hold_the_target_is_named():
    tokens, two = tokenise(), np.zeros(2, np.int64)
    items = Ragged.from_lengths(np.array([0, 0, 1, 2]), np.array([2, 2]))
    assert keep_latest(tokens, items, 20, two).lengths.tolist() == [2, 2]
    with pytest.raises(UserError, match="row 1 needs 12 tokens with one item in its history"):
        keep_latest(tokens, items, 11, two)


INSTRUCTION = {
    "templates": ("Of {user}: {history}.</s>Next: {target}", "{history} ({user}) -> {target}"),
    "item": '"{title}" by {brand}{vector}',
    "separator": ", ",
    "target": '"{title}"',
    "end": "</s>",
}


def test_a_template_has_words_attributes_vectors_and_control_tokens():
    tokens = tokenise(**INSTRUCTION | {"item": '"{title}"{vector}'})
    assert tokens.placeholder == 5  # <reserved_1>
    texts, slots, _ = rows_of(tokens, [0, 2, 1])
    assert texts == ['^Of #: "a"#, "ccc"#.</s>Next: "bb"</s>']
    assert slots == [[USER_SLOT, 0, 2]]
    texts, slots, _ = rows_of(tokens, [0, 1], template=1)
    assert texts == ['^"a"# (#) -> "bb"</s>']
    assert slots == [[0, USER_SLOT]]
    found = prompts(tokens, np.array([[-1, 2, 1]]), budget=100)
    assert decode(found.tokens[0]) == '^Of #: "ccc"#, "bb"#.</s>Next: '
    assert found.slots[0].tolist() == [USER_SLOT, 2, 1]
    assert tokenise(item="{title}{vector}", placeholder="é").placeholder == ord("é")


def test_items_are_shown_by_their_vectors_alone():
    changes = {"item": "{vector}", "target": " {title}", "separator": ","}
    tokens = tokenise(**changes)
    texts, slots, _ = rows_of(tokens, [0, 2, 1])
    assert (texts, slots) == (["^P:#,#\n bb\n"], [[0, 2]])
    whole = tokenise(**changes, tokenised="whole")
    assert rows_of(whole, [0, 2, 1])[:2] == (["^P:#,#\n bb\n"], [[0, 2]])
    assert len(tokens.shown) == 3


def test_candidates_stand_between_history_and_target():
    tokens = tokenise(
        templates=("P:{history}\nOf:{candidates}!{target}",),
        item=" {title}{vector}",
        separator=",",
        candidates=2,
    )
    history, candidates = np.array([[-1, 1, 0], [2, 1, 0]]), np.array([[2, 0], [1, 2]])
    found = prompts(tokens, history, 25, candidates)
    assert decode(found.tokens[0]) == "^P: bb#, a#\nOf: ccc#, a#!"
    assert found.slots[0].tolist() == [1, 0, 2, 0]
    assert decode(found.tokens[1]) == "^P: a#\nOf: bb#, ccc#!"  # " bb#," were too many
    items = Ragged.from_lengths(np.array([1, 2, 0, 0]), np.array([4]))
    row = row_tokens(tokens, items, np.zeros(1, np.int64), candidates=2).prompts.tokens
    assert decode(row[0]) == "^P: bb#\nOf: ccc#, a#! a\n"
    with pytest.raises(UserError, match="row 1 needs 21 tokens with one item in its history"):
        prompts(tokens, history, 20, candidates)
    with pytest.raises(UserError, match="show {candidates}, and there are none"):
        prompts(tokens, history, 100)
    assert len(prompts(tokenise(), history, 100, candidates).slots.values) == 0
    with pytest.raises(UserError, match="{candidates} are those of one target: set training.tar"):
        check_sequences(tokens)


def test_attributes_are_shown():
    columns = {"title": ("a", "bb"), "brand": ("Xy", "Zz")}
    item = PromptTemplate(item="{title} ({brand}) {vector}")
    tokens = tokenise_items(columns, LETTERS, item)
    assert rows_of(tokens, [0, 1])[0] == ["^a (Xy) #\nbb (Zz)\n"]


def test_without_an_end_nothing_is_added():
    tokens = tokenise(item="<{title}>", separator="", end="", templates=("{history}{target}",))
    assert rows_of(tokens, [0, 1])[0] == ["^<a><bb>"]
    check_sequences(tokens)


@pytest.mark.parametrize(
    ("titles", "changes", "message"),
    [
        (("a", "  ", "c"), {}, "item 1 has no title, which prompt.item shows"),
        (("a", "b\nc", "c"), {}, r"item 1: ' b\\nc' contains prompt.end as this tokenizer reads"),
        (("a", "Café", "c"), {}, "item 1: ' Café' contains é as"),
        (("a", "b", "c"), {"end": "--"}, "prompt.end '--' is 2 tokens .*control.*</s>"),
        (("a", "b", "c"), {"item": "{brand}"}, "item 1 has no brand, which prompt.item shows"),
        (("a", "b", "c"), {"item": "{year}"}, "{year}: .* {title}, {brand}, {vector}"),
        (
            ("a", "b", "c"),
            {"target": "{year}"},
            "prompt.target has {year}: .* {title}, {brand}; data.attrib",
        ),
        (("a", "b?", "c"), {"item": "{title}{vector}", "placeholder": "?"}, "prompt.placeholder"),
        (
            ("a", "b", "c"),
            {"item": "{title}{vector}", "placeholder": ":"},
            "the prompt: .*P:",
        ),
        (("a", "b", "c"), {"item": "{title}{vector}", "placeholder": "ab"}, "'ab' is 2 tokens"),
    ],
)
def test_bad_items_and_templates_are_named(titles, changes, message):
    with pytest.raises(UserError, match=message):
        tokenise(titles, **changes)


def test_an_empty_attribute_is_said_with_the_field_that_shows_it():
    with pytest.raises(UserError, match="item 1 has no brand, which prompt.target shows"):
        tokenise(target="{brand}")
    with pytest.raises(UserError, match="item 1 has no brand, which training.tasks shows"):
        tokenise_items(COLUMNS, LETTERS, TEMPLATE, ("{title} {brand}",))


def test_every_text_is_tokenised_once():
    texts = []

    def first(text):
        texts.append(text)
        return encode(text)

    tokenise_items(COLUMNS, LETTERS._replace(first=first), TEMPLATE, ("{title} {title}",))
    assert sorted(texts) == sorted({*texts})
    assert {"P:", "a", "bb", "ccc"} <= {*texts}


def test_an_item_without_tokens_is_named():
    letters = LETTERS._replace(inside=lambda text: encode(text.replace("q", "")))
    with pytest.raises(UserError, match="item 1: this tokenizer makes no tokens of {'title'"):
        tokenise_items({"title": ("a", "q")}, letters, replace(TEMPLATE, item="{title}"))


def test_a_tokenizer_without_a_spare_control_token_needs_a_placeholder():
    letters = LETTERS._replace(spare=())
    with pytest.raises(UserError, match="name in prompt.placeholder a text of one token"):
        tokenise_items(COLUMNS, letters, PromptTemplate(item="{title}{vector}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ("{history}",)}, "{history} once, then {target} once, at its end"),
        ({"templates": ("{target}{history}",)}, "once, at its end"),
        ({"templates": ("{history}{history}{target}",)}, "once, at its end"),
        ({"templates": ("{history}{target}.",)}, "once, at its end"),
        ({"templates": ("{candidates}{history}{target}",)}, "{candidates} may stand once between"),
        (
            {"templates": ("{history}{target}", "{history}{candidates}{target}")},
            "in all of them or in none",
        ),
        ({"templates": ("{history}{candidates}{target}",)}, "prompt.candidates goes with {cand"),
        (
            {"candidates": 5},
            "prompt.candidates goes with {candidates} in prompt.templates: give both or none",
        ),
        (
            {"templates": ("{history}{target}", "{hist}{target}")},
            "{hist}: .* {history}, {cand",
        ),
        ({"templates": ("{history{target}",)}, "has '{history{target}'"),
        ({"templates": ("{history!r}{target}",)}, "a field alone in braces"),
        ({"item": "{title:>9}"}, "prompt.item has '{title:>9}': expected the name of a field"),
        ({"item": "title"}, "prompt.item has 'title': expected a field"),
        ({"item": "title", "target": "{title}"}, "prompt.item has 'title': expected a field"),
        ({"item": "{vector}"}, "prompt.target, by default prompt.item without {vector}, is ''"),
        ({"target": "title"}, "prompt.target, .*, is 'title': expected a field"),
        ({"target": "{title}{vector}"}, "only items of a history carry vectors"),
    ],
)
def test_bad_templates_are_refused_where_they_are_given(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TEMPLATE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ("{history}\n{target}", "{history}\n{target}")}, "has several"),
        ({"templates": ("{history}. {target}",)}, "between {history} and {target}"),
        ({"templates": ("{user}{history}\n{target}",)}, "a vector that knows all items"),
        ({"item": " {title}{vector}"}, "do not begin with prompt.target and prompt.end: set train"),
        ({"target": "{title} and more"}, "do not begin with"),
    ],
)
def test_templates_whose_items_cannot_all_be_targets_say_so(changes, message):
    with pytest.raises(UserError, match=message):
        check_sequences(tokenise(**changes))


def test_tokens_beyond_the_vocabulary_are_named():
    tokens = tokenise()
    check_vocabulary(tokens, ("x", "y", "z"), ord("c") + 1)
    with pytest.raises(UserError, match="item 'z' has token 99, .* vocabulary is 99 tokens: its"):
        check_vocabulary(tokens, ("x", "y", "z"), ord("c"))
    words = tokenise(templates=("~{history}\n{target}",))
    with pytest.raises(UserError, match=r"the prompt has token 126"):
        check_vocabulary(words, ("x", "y", "z"), 126)
    for task in ("{title}{title}~", "~{title}{title}"):
        tasks = tokenise_items(COLUMNS, LETTERS, TEMPLATE, (task,))
        with pytest.raises(UserError, match="item 'x' has token 126"):
            check_vocabulary(tasks, ("x", "y", "z"), 126)
    question = PromptTemplate(("{history}{item}{target}",))
    answers = tokenise_questions(COLUMNS, LETTERS, question, ("no", "y~"))
    with pytest.raises(UserError, match="the answer 'y~' has token 126"):
        check_vocabulary(answers, ("x", "y", "z"), 126)


def test_an_empty_history_is_an_error():
    with pytest.raises(ValueError, match="row 1 has an empty history"):
        prompts(tokenise(), np.array([[0, 1], [-1, -1]]), budget=50)


def test_ragged_pad_take_and_stack():
    ragged = Ragged.from_lengths(np.array([1, 2, 3, 4]), np.array([1, 0, 3]))
    assert ragged.pad(np.array([2, 1]), 4, -1).tolist() == [[2, 3, 4, -1], [-1, -1, -1, -1]]
    assert ragged.take(np.array([2, 0])).values.tolist() == [2, 3, 4, 1]
    assert Ragged.stack([ragged, ragged.take(np.array([2]))])[3].tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="row 2 has 3 entries"):
        ragged.pad(np.array([2]), 2, 0)
