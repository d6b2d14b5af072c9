"""Semantic ids: the file, and what is refused."""

import json

import numpy as np
import pytest

from tca4rec_jax.errors import UserError
from tca4rec_jax.semantic_ids.ids import SemanticIds, read_ids, write_ids

IDS = {
    "0": ["<a_10>", "<b_7>", "<c_2>"],
    "1": ["<a_10>", "<b_7>", "<c_2>"],  # shared
    "x y": ["<a_2>", "<b_10>"],
    "3": ["<a_2>", "<b_7>", "<c_2>", "<d_0>"],
}


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_reads_the_published_layout_in_the_order_of_the_catalogue(tmp_path):
    ids = read_ids(_write(tmp_path / "index.json", IDS | {"not in it": ["<z_1>"]}), [*IDS][::-1])
    assert [list(ids[item]) for item in range(4)] == list(IDS.values())[::-1]
    assert ids.texts[1] == "<a_2><b_10>"
    # By level, then by number: 2 before 10.
    assert ids.tokens == ("<a_2>", "<a_10>", "<b_7>", "<b_10>", "<c_2>", "<d_0>")
    assert ids.codes.values.dtype == np.int32
    assert ids.codes[3].tolist() == [1, 2, 4]


def test_writes_what_it_reads(tmp_path):
    path = tmp_path / "ids.json"
    write_ids(path, SemanticIds.of(list(IDS.values()), list(IDS)), list(IDS))
    assert json.loads(path.read_text()) == IDS
    assert read_ids(path, list(IDS)).texts[2] == "<a_2><b_10>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"0": ["<a_1>"]}, r"2 of 3 items have no id, such as '1', '2'"),
        ({"0": ["<a_1>"], "1": [], "2": ["<a_2>"]}, r"id of item '1' is empty"),
        (
            {"0": ["<a_1>"], "1": [f"<{n}>" for n in range(27)], "2": ["<a_2>"]},
            r"id of item '1' has 27 tokens: expected at most 26",
        ),
        ({"0": ["<a_1>"], "1": "<a_2>", "2": ["<a_3>"]}, r"item '1' has '<a_2>': expected a list"),
        ({"0": ["<a_1>"], "1": [3], "2": ["<a_3>"]}, r"item '1' has \[3\]: expected a list"),
        ({"0": ["<a_1>"], "1": ["a_2"], "2": ["<a_3>"]}, r"item '1' has the token 'a_2'"),
        ({"0": ["<a_1>"], "1": ["<a 2>"], "2": ["<a_3>"]}, r"item '1' has the token '<a 2>'"),
        ({"0": ["<a_1>"], "1": ["<a_2><b_1>"], "2": ["<a_3>"]}, r"has the token '<a_2><b_1>'"),
        (
            {"0": ["<a_1>", "<b_1>"], "1": ["<b_1>", "<a_1>"], "2": ["<a_3>"]},
            r"item '1' has the token '<b_1>' at level 1, another item at level 2",
        ),
        (
            {"0": ["<a_1>", "<b_1>"], "1": ["<a_3>"], "2": ["<a_1>"]},
            r"id of item '2', <a_1>, is a prefix of that of item '0', <a_1><b_1>",
        ),
        ([1], r"expected an object in braces"),
        ("{", r"not a readable JSON file"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', r"\(a name occurs twice in an object: '0'\)"),
    ],
)
def test_refuses_in_one_line_that_names_the_file(tmp_path, content, expected):
    path = _write(tmp_path / "ids.json", content)
    with pytest.raises(UserError, match=expected) as error:
        read_ids(path, ["0", "1", "2"])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_ids(tmp_path / "ids.json", ["0"])
