import re

import pytest

from tca4rec_jax.data.odd_titles import odd_titles


@pytest.mark.parametrize(
    ("titles", "length", "note"),
    [
        (
            ["Tom &amp; Jerry", "Up", "<b>Heat</b>"],
            99,
            "2 titles hold HTML entities or tags, such as 'T",
        ),
        (["nan", "None", "Nancy"], 99, "2 titles are 'nan' or the like"),
        (["Up", "Heat", "Up", "Up", "Heat"], 99, "5 items share their title .* 3 of them 'Up'"),
        (
            ["Alien", "Aliens", "Alien 3"],
            5,
            "2 distinct titles equal .* such as 'Aliens' to 'Alien'",
        ),
    ],
)
def test_what_is_odd_is_said(titles, length, note):
    (found,) = odd_titles(titles, [title[:length] for title in titles])
    assert re.search(note, found), found


def test_usual_titles_are_not_odd():
    titles = ("M*A*S*H", "AT&T", "I <3 Huckabees", "Q & A; etc.", "a < b > c")
    assert odd_titles(titles, titles) == []
