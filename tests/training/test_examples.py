"""Examples against a plain loop over titles and tokens."""

import tracemalloc

import numpy as np
import pytest

from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.item_tokens import TextEncoder, tokenise_items
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError
from tca4rec_jax.training.examples import build_examples, row_of_example

TITLES = ("ab", "abc", "b", "ad", "ab")
TEMPLATE = PromptTemplate(("P{history}\n{target}",))


def encode(text):
    return [ord(character) for character in text]


@pytest.fixture
def tokens():
    return tokenise_items({"title": TITLES}, TextEncoder(encode, encode), TEMPLATE)


def sequences(*rows):
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    flat = np.concatenate(rows)
    return ItemSequences(np.arange(len(rows)), flat, offsets, np.full(flat.size, -1))


def expected(rows, tokens, trie):
    """(tokens, positions, labels, decisions) of each row of (items, supervised from) by hand."""
    examples = []
    for items, first_supervised in rows:
        ids, positions, labels, decisions = list(tokens.before[0]), [], [], []
        for index, item in enumerate(items):
            title = tokens.written[item].tolist()
            if index >= first_supervised:
                node = 0
                for offset, token in enumerate(title):
                    start = trie.child_start[node]
                    children = range(start, start + trie.child_count[node])
                    child = next(c for c in children if trie.token[c] == token)
                    if len(children) > 1:
                        decisions.append((len(positions), index - first_supervised, child - start))
                    node = child
                    positions.append(len(ids) - 1 + offset)
                    labels.append(token)
            ids += title
        examples.append((ids, positions, labels, decisions))
    return examples


def check(examples, rows, tokens):
    trie = ItemTrie.build(tokens.written)
    compressed = trie.compress()
    wanted = expected(rows, tokens, trie)
    assert len(examples) == len(wanted)
    for r, (ids, positions, labels, decisions) in enumerate(wanted):
        assert examples.tokens[r].tolist() == ids
        assert examples.position[r].tolist() == positions
        assert examples.label[r].tolist() == labels
        got = zip(
            examples.decisions.position[r],
            examples.decisions.title[r],
            examples.decisions.child[r],
            strict=True,
        )
        assert list(got) == decisions
        assert (compressed.child_count[examples.decisions.node[r]] > 1).all()


def test_sequences_are_cut_by_whole_titles(tokens):
    split = sequences([0, 1, 2, 3, 4, 0], [2, 2])
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    examples = build_examples(split, tokens, decisions, targets="all", max_tokens=1 + 4 + 5 + 3)
    check(examples, [([0, 1, 2], 1), ([3, 4, 0], 1), ([2, 2], 1)], tokens)
    assert [examples.cf_position[r].tolist() for r in range(3)] == [[1, 2], [4, 5], [7]]


def test_last_keeps_the_target_and_the_latest_history(tokens):
    split = sequences([0, 1, 2, 3], [4], [2, 1])
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    examples = build_examples(split, tokens, decisions, targets="last", max_tokens=13)
    check(examples, [([1, 2, 3], 2), ([2, 1], 1)], tokens)
    assert [examples.cf_position[r].tolist() for r in range(2)] == [[3], [6]]


def test_candidates_are_the_target_and_items_outside_the_history():
    shown = "P{history}|{candidates}={target}"
    template = PromptTemplate((shown,), item="{title}", separator=",", candidates=3)
    tokens = tokenise_items({"title": TITLES[:4]}, TextEncoder(encode, encode), template)
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    split = sequences(*[[0, 1], [3, 2]] * 20)
    how = {"targets": "last", "max_tokens": 50, "candidates": 3}
    examples = build_examples(split, tokens, decisions, **how)
    texts = ["".join(map(chr, examples.tokens[row])) for row in range(40)]
    shown = [text[text.index("|") + 1 : text.index("=")].split(",") for text in texts]
    assert {text[: text.index("|")] for text in texts} == {"Pab", "Pad"}
    assert {text[text.index("=") + 1 :] for text in texts} == {"abc\n", "b\n"}
    assert all({*row} == {"abc", "b", "ad"} for row in shown[::2])
    assert len({tuple(row) for row in shown[::2]}) == 6  # every order
    assert [examples.cf_position[row].tolist() for row in range(3)] == [[1], [3], [5]]
    assert [chr(examples.label[0][0]), chr(examples.label[1][0])] == ["a", "b"]
    with pytest.raises(ValueError, match="row 0 has 2 allowed items .*, too few for 5 cand"):
        build_examples(split, tokens, decisions, **how | {"candidates": 5})


def assert_same(found, wanted):
    for ours, theirs in zip(arrays_of(found), arrays_of(wanted), strict=True):
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())


def arrays_of(examples):
    *parts, decisions = vars(examples).values()
    return [one for part in (*parts, *decisions) for one in (part.values, part.offsets)]


@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize("tasks", [(), ("{title} is {id}", "{id}{title}\n")])
@pytest.mark.parametrize("rows", [1, 7, 20, 10**6])
def test_some_examples_are_those_of_all(targets, tasks, rows):
    columns = {"title": TITLES, "id": tuple("12345")}
    shown = "P{history}\n{target}", "Q{history}|{target}"
    template = PromptTemplate(shown[: 2 if targets == "last" else 1])
    tokens = tokenise_items(columns, TextEncoder(encode, encode), template, tasks)
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    split = sequences(*[[0, 1], [3, 2, 4], [1], [4, 0, 2, 1, 3]] * 5)
    how = {"targets": targets, "max_tokens": 13, "seed": 3}
    whole = build_examples(split, tokens, decisions, **how)
    drawn = np.sort(np.random.default_rng(3).permutation(len(whole))[:rows])
    found = build_examples(split, tokens, decisions, rows=rows, **how)
    assert len(found) == min(rows, len(whole))
    assert_same(found, whole.take(drawn))


@pytest.mark.parametrize("targets", ["all", "last"])
def test_of_some_examples_alone_tokens_are_made(tokens, targets):
    split = sequences(*[[0, 1, 2, 3] * 4] * 300)
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    peaks = []
    for rows in (0, 10):
        tracemalloc.start()
        build_examples(split, tokens, decisions, targets=targets, max_tokens=99, rows=rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 2


def test_errors_name_what_is_wrong(tokens):
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    with pytest.raises(ValueError, match=r"title of item 1 has 5 tokens"):
        build_examples(sequences([0, 1]), tokens, decisions, targets="all", max_tokens=5)
    with pytest.raises(ValueError, match=r"training.targets is 'x'"):
        build_examples(sequences([0, 1]), tokens, decisions, targets="x", max_tokens=50)
    with pytest.raises(ValueError, match="single item"):
        build_examples(sequences([0]), tokens, decisions, targets="all", max_tokens=50)


def test_tasks_add_an_example_of_every_item_whose_answer_is_supervised():
    columns = {"title": ("ab", "abc", "b"), "id": ("12", "13", "2")}
    letters = TextEncoder(
        lambda text: [ord(c) for c in text],
        lambda text: [1, *(ord(c) for c in text)],
        {"<bos>": 1},
    )
    tasks = ("{title} is {id}", "{id}{title}\n")
    template = PromptTemplate(("P{history}\n{target}",))
    plain = tokenise_items(columns, letters, template)
    tokens = tokenise_items(columns, letters, template, tasks)
    rows = sequences([0, 1, 2], [2, 0])
    decisions = title_decisions(ItemTrie.build(tokens.written).compress())
    before, found = (
        build_examples(rows, one, decisions, targets="last", max_tokens=64)
        for one in (plain, tokens)
    )
    assert (len(before), len(found)) == (2, 2 + 2 * 3)
    assert row_of_example(found, rows).tolist() == [0, 1] + [-1] * 6
    texts = ["ab is 12", "abc is 13", "b is 2", "12ab\n", "13abc\n", "2b\n"]
    answers = [" 12", " 13", " 2", "ab\n", "abc\n", "b\n"]
    for example, (text, answer) in enumerate(zip(texts, answers, strict=True), 2):
        assert found.tokens[example].tolist() == [1, *map(ord, text)]
        assert found.label[example].tolist() == [*map(ord, answer)]
        predicted = found.tokens[example][found.position[example] + 1]
        assert predicted.tolist() == found.label[example].tolist()
        assert not found.cf_position[example].size
        assert not found.decisions.node[example].size
    for field in ("tokens", "label", "position", "cf_position"):
        ours, theirs = getattr(found, field), getattr(before, field)
        assert ours.values.dtype == theirs.values.dtype
        for row in range(2):
            np.testing.assert_array_equal(ours[row], theirs[row])


def test_a_task_around_a_history_is_refused_with_what_to_use():
    letters = TextEncoder(*2 * [lambda text: [ord(c) for c in text]])
    with pytest.raises(UserError, match=r"about one item and no user; .* in prompt.templates"):
        tokenise_items({"title": ("ab",)}, letters, PromptTemplate(), ("{history} {title}",))


@pytest.mark.parametrize("task", ["{title} alone", "{title}{brand}"])
def test_a_task_without_two_fields_of_items_is_refused(task):
    letters = TextEncoder(*2 * [lambda text: [ord(c) for c in text]])
    with pytest.raises(UserError, match=r"training.tasks"):
        tokenise_items({"title": ("ab",)}, letters, PromptTemplate(), (task,))
