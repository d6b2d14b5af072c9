"""A page in one file: what is in it, what is escaped, that it needs nothing else."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from tca4rec_jax.intervals import Interval
from tca4rec_jax.pages.blocks import (
    Command,
    Numbers,
    Picture,
    Pictures,
    Poster,
    Posters,
    Section,
    Text,
)
from tca4rec_jax.pages.html import html_page
from tca4rec_jax.pages.markdown import markdown_page

EVIL = '<script src="https://x.example/a.js">alert("x")</script> & \x1b[1m'


def figure():
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1], [1, 0])
    return made


def page():
    rows = {EVIL: {"x": 1.0, "note": EVIL}, "b": {"x": Interval(0.25, 0.125, 0.5)}}
    blocks = [
        Text(f"{EVIL} and `{EVIL}`"),
        Command(EVIL),
        Numbers(rows, "a", EVIL),
        Numbers(rows, "a", "more", is_closed=True),
        Pictures([Picture(f"drawn {EVIL}", figure())], "page/x.png", "drawn"),
    ]
    posters = Posters(EVIL, [Poster(EVIL, "1"), Poster("Heat", "2", is_target=True)])
    sections = [Section(EVIL, blocks), Section("Part", [posters], 3)]
    return html_page(EVIL, [Text("lead")], sections)


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_every_text_is_escaped_and_nothing_is_obeyed():
    text = page()
    assert "<script src" not in text
    assert "\x1b" not in text
    assert len(Tags(text).of("script")) == 1  # its own


def test_a_page_needs_no_network():
    found = Tags(page())
    links = [
        attributes[name]
        for _, attributes in found.tags
        for name in ("src", "href", "srcset", "action", "data", "poster")
        if name in attributes
    ]
    assert {re.match(r"data:|#", link)[0] for link in links} == {"data:", "#"}
    assert not found.of("link")
    assert "@import" not in page()
    (policy,) = (m["content"] for m in found.of("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; img-src data:;")


@pytest.mark.usefixtures("drawn")
def test_a_picture_is_an_svg_with_words_and_the_same_each_time():
    one, two = (Tags(page()).of("img")[0] for _ in range(2))
    assert one == two
    assert one["alt"].startswith("drawn <script")
    assert (one["width"], one["height"]) == ("192", "96")
    svg = base64.b64decode(one["src"].partition("base64,")[2]).decode()
    assert svg.lstrip().startswith("<?xml")
    assert "background" not in svg


def test_a_table_says_what_its_cells_are_of():
    found = Tags(page())
    headers = [attributes["scope"] for attributes in found.of("th")]
    assert headers[:3] == ["col"] * 3
    assert headers.count("row") == 4
    assert "0.2500 [0.1250,\xa00.5000]" in found.text
    assert len(found.of("details")) == 1
    regions = [a["aria-label"] for a in found.of("div") if a.get("role") == "region"]
    assert len(set(regions)) == len(regions) == 2
    assert all(a["tabindex"] == "0" for a in found.of("div") if a.get("role") == "region")


def test_sections_are_listed_and_headed():
    found = Tags(page())
    (link,) = found.of("a")
    assert [heading["id"] for heading in found.of("h2")] == [link["href"][1:]]
    assert len(found.of("h1")) == len(found.of("h3")) == 1
    assert "2, came next" in found.text


def test_the_same_sections_are_markdown():
    table = Numbers({"a|b": {"x": 0.5}}, "label")
    picture = Pictures([], "page/x.png", "a line")
    sections = [
        Section("One", [Text("`code`"), table, Numbers({"c": {"x": 1}}, is_closed=True)]),
        Section("Part", [picture, Command("run it")], 3),
    ]
    assert markdown_page("All", [Text("lead")], sections) == (
        "# All\n\nlead\n\n## One\n\n`code`\n\n| label | x |\n| --- | ---: |\n| a\\|b | 0.5000 |\n"
        "\n### Part\n\n![a line](page/x.png)\n\n    run it\n"
    )
    with pytest.raises(TypeError, match="Posters"):
        markdown_page("All", [Posters("x", [])], [])


def test_a_table_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        html_page("x", [], [Section("y", [Numbers({})])])
