"""The published preprocessing of Amazon's files, against a plain reading of its rules."""

import gzip
import json
import random
import string
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from made_raw import steps_of

from tca4rec_jax.config import default_config, published_rows
from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.data.raw.published_titles import published_text

DAY = 86400
MARKED = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \t\n\r\x0b\x0c"
)
LAST = 1_500_000_000 // DAY * DAY


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Tom &amp; Jerry &quot;Duo&quot;", 'Tom & Jerry "Duo"'),
        ("Twice &amp;amp; &amp;lt;b", "Twice & <b"),
        ("“Curly” – ‘quotes’…  and\nlines", "\"Curly\" - 'quotes' and lines"),
        ("Lego® Brand™", "Lego Brand"),
        ("Café", MARKED),
        ("12 34", MARKED),
        ("ab", MARKED),
        (string.printable, "unknown title"),
    ],
)
def test_titles_are_cleaned_as_published(raw, cleaned):
    assert published_text(raw) == cleaned


def test_titles_are_cut_before_they_are_cleaned():
    raw = "x" * 46 + " &amp; y"
    assert published_text(raw, 50) == "x" * 46 + " &am"
    assert published_text("x" * 45 + "&amp; y", 50) == "x" * 45 + "&"


def made(seed):
    """Reviews of 30 users, 40 items and 12 days, most in the window; items 0, 1, 2 are odd."""
    choose = random.Random(seed)
    reviews = [
        {
            "reviewerID": f"U{choose.randrange(30):02}",
            "asin": f"A{min(choose.randrange(40), choose.randrange(60)):02}",
            "overall": float(choose.randint(1, 5)),
            "unixReviewTime": LAST - choose.choice([*range(12), 1439, 1440, 1441]) * DAY,
        }
        for _ in range(900)
    ]
    reviews += [{**reviews[0], "unixReviewTime": LAST}, *reviews[:9]]
    titles = {0: "", 1: "None", 2: "Caf\u00e9"}
    items = [
        {"asin": f"A{number:02}", "title": titles.get(number, f"Title  {number} &amp; {'y' * 60}")}
        | {"brand": "\u00e9" if number == 5 else "" if number == 6 else f"Brand {number}"}
        for number in choose.sample(range(40), 40)
    ]
    return reviews, [*items, {**items[7], "title": "A second title"}]


def rows_as_published(reviews, items, sizes, days, brands):
    """Rows of (user, items), the ids of the items."""
    kept = {i["asin"] for i in items if i["title"] not in ("", "unknown", "None")}
    if brands:
        kept -= {"A05", "A06"}
    rows = [(r["unixReviewTime"], r["reviewerID"], r["asin"]) for r in reviews]
    rows = [row for row in rows if row[2] in kept]
    if days:
        first = max(row[0] for row in rows) - days * DAY
        rows = [row for row in rows if row[0] > first]
    while True:
        users, counts = Counter(row[1] for row in rows), Counter(row[2] for row in rows)
        core = [row for row in rows if users[row[1]] >= 10 and counts[row[2]] >= 5]
        if len(core) == len(rows):
            break
        rows = core
    rows.sort()
    numbers = [{one: n for n, one in enumerate(dict.fromkeys(r[c] for r in rows))} for c in (1, 2)]
    rows.sort(key=lambda row: (row[0], numbers[0][row[1]], numbers[1][row[2]]))
    histories, found = {}, []
    for _, user, item in rows:
        past = histories.setdefault(user, [])
        if len(past) >= 10:
            found.append((user, [*past[-10:], item]))
        past.append(item)
    train, validation = int(len(found) * 0.8), len(found) // 10
    parts = found[:train], found[train : train + validation], found[train + validation :]
    drawn = []
    for part, size in zip(parts, sizes, strict=True):
        frame = pd.DataFrame({"row": range(len(part))})
        frame = frame.sample(size, random_state=42) if len(part) > size else frame
        drawn.append([part[row] for row in frame["row"]])
    return drawn, sorted({row[2] for row in rows})


@pytest.mark.parametrize(
    ("seed", "days", "brands"), [(0, 0, False), (1, 1440, True), (2, 1440, True)]
)
def test_the_rows_are_those_of_the_published_rules(tmp_path, seed, days, brands):
    reviews, items = made(seed)
    for name, rows in {"Made.json.gz": reviews, "meta_Made.json.gz": items}.items():
        (tmp_path / name).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    config = default_config()
    published_rows(config)
    assert config.data.samples == (10_000, 5_000, 5_000)
    config.data.update(samples=(60, 7, 9999), interactions=str(tmp_path / "Made.json.gz"))
    config.data.catalogue = str(tmp_path / "meta_Made.json.gz")
    config.data.filters.last_days = days
    if brands:
        config.data.update(attributes=("brand",), needed_attributes=("brand",))
    data = prepare(config.data, tmp_path / "data")
    expected, catalogue = rows_as_published(reviews, items, (60, 7, 9999), days, brands)
    assert data.catalogue.item_ids == tuple(catalogue)
    for name, rows in zip(("train", "validation", "test"), expected, strict=True):
        split = data.splits[name]
        found = [
            (data.user_ids[user], [data.catalogue.item_ids[item] for item in split[row]])
            for row, user in enumerate(split.user)
        ]
        assert found == rows
        assert len(rows) > 5
    titled = [item for item in items if item["title"] not in ("", "unknown", "None")]
    stored = {item["asin"]: item["title"] for item in reversed(titled)}  # the first one counts
    cleaned = {
        one: title[:50].replace("&amp;", "&").replace("  ", " ") if title.isascii() else MARKED
        for one, title in stored.items()
    }
    assert data.catalogue.titles == tuple(map(cleaned.get, catalogue))
    assert MARKED in data.catalogue.titles
    assert len(data.splits["train_sequences"].items) > 60
    assert [step["step"] for step in steps_of(tmp_path / "data")][:2] == [
        "in the file",
        "items with a title",
    ]
    assert np.all(np.diff([step["interactions"] for step in steps_of(tmp_path / "data")]) <= 0)
