"""Every downloaded format is read as plain Python reads it, or refused by its line."""

import gzip
import json
import random
import re
from collections import Counter

import pytest
import tensorflow_datasets as tfds
from made_raw import DAY, EVENTS, ITEMS, MADE, attribute, steps_of

from tca4rec_jax.data.dataset import load, prepare
from tca4rec_jax.data.filters import Report
from tca4rec_jax.data.raw import FORMATS, ItemTexts, read_raw
from tca4rec_jax.data.raw.columns import NUMBER, TEXT, WHOLE
from tca4rec_jax.data.raw.lines import read_lines
from tca4rec_jax.data.tables import Reading
from tca4rec_jax.errors import UserError

PLAIN = {"reading": Reading(), "texts": ItemTexts(), "report": Report()}


def read(made, folder, **settings):
    files = {"interactions": made.interactions(folder)}
    if made.catalogue:
        files["catalogue"] = made.catalogue(folder)
    settings = {"texts": ItemTexts(made.attributes), "ratings": made.ratings, **settings}
    return read_raw(made.source, files, reading=Reading(made.encoding), report=Report(), **settings)


@pytest.mark.parametrize("name", MADE)
def test_every_format_has_the_same_content(tmp_path, name):
    made = MADE[name]
    catalogue, interactions = read(made, tmp_path)
    titles = {item.id: made.title(item) for item in ITEMS if item.title}
    if not made.catalogue:
        titles = {event.item: event.item for event in EVENTS}
    kept = [event for event in EVENTS if event.item in titles]
    used = sorted({event.item for event in kept})
    assert catalogue.item_ids == tuple(used)
    assert catalogue.titles == tuple(" ".join(titles[one].split()) for one in used)
    items = {item.id: item for item in ITEMS}
    for attribute_name in made.attributes:
        expected = tuple(attribute(items[one], attribute_name) for one in used)
        assert catalogue.attributes[attribute_name] == expected
    users = sorted({event.user for event in EVENTS})
    assert interactions.user_ids == tuple(users)
    assert interactions.user.tolist() == [users.index(event.user) for event in kept]
    assert interactions.item.tolist() == [used.index(event.item) for event in kept]
    assert interactions.timestamp.tolist() == [event.time * made.ticks for event in kept]
    ratings = [event.rating for event in kept] if made.ratings else None
    found = interactions.rating
    assert (found if found is None else found.tolist()) == ratings


def test_interactions_of_items_without_a_title_are_left_out_and_counted(tmp_path, caplog):
    read(MADE["Yelp"], tmp_path)
    missing = [event for event in EVENTS if event.item in ("3", "404")]
    assert (
        f"{len(missing)} of {len(EVENTS)} interactions are with 2 items that have no" in caplog.text
    )


def test_titles_become_one_line(tmp_path):
    made = MADE["Amazon 2018"]
    files = {"interactions": made.interactions(tmp_path), "catalogue": tmp_path / "meta.json"}
    files["catalogue"].write_text('{"asin": "7", "title": " Two\\n\\tlines\\u2028of "}\n')
    catalogue, _ = read_raw("amazon_2018", files, **PLAIN)
    assert catalogue.titles == ("Two lines of",)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("Amazon 2018", '"asin": "', '"asin": 9, "x": "', "json, line 1: asin is 9, expected text"),
        ("Amazon 2018", '{"rev', '["rev', r"json, line 1 is no JSON object: .*begins with"),
        ("Amazon 2018", "{", "3 #", "json, line 1 is no JSON object"),
        ("Amazon 2018", '"unixReviewTime"', '"when"', "json, line 1: unixReviewTime is None, exp"),
        ("Amazon 2018", '"overall": ', '"overall": NaN, "x": ', "line 1: overall is nan, exp"),
        ("Amazon 2018", '"asin"', '"asin": "1", "asin"', "line 1 is no JSON object: a name occurs"),
        ("Amazon 2018, ratings", ",", ",,", "Toys.csv, row 1 has 5 fields, expected item"),
        ("Amazon 2018, ratings", "\n", "\n1,2,3\n", "row 2 has 3 fields, expected item, user"),
        ("Amazon 2014, ratings", ".0,", ".0,x", "row 1: timestamp is 'x13.*', expected a"),
        ("MovieLens 1M", "::", ":", "ratings.dat, row 1 has 3 fields, expected user, item, ra.*::"),
        ("MovieLens 1M", "::", "::\x1f", "ratings.dat, line 1: a control character"),
        ("MovieLens 20M", "movieId", "item", r"ratings.csv has no column \['movieId'\]"),
        ("Steam", "{", "{[", "json, line 1 is no Python dict: "),
        ("Steam", "{", "dict(a={", "json, line 1 is no Python dict: "),
        ("Goodreads", "2011", "in 2011", "line 1: date_added is '.* in 2011', exp"),
        ("LastFM 1K", "\tA ", "\t", None),
        ("LastFM 1K", "\t", " ", "tsv, row 1 has 5 fields, expected user, timestamp, artist_id"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_their_line(tmp_path, name, old, new, message):
    made = MADE[name]
    path = made.interactions(tmp_path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    path = path.with_suffix("") if path.suffix == ".gz" else path
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    files = {"interactions": path} | (
        {"catalogue": made.catalogue(tmp_path)} if made.catalogue else {}
    )
    if message is None:
        read_raw(made.source, files, **PLAIN)
        return
    with pytest.raises(UserError, match=message) as error:
        read_raw(made.source, files, ratings=made.ratings, **PLAIN)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_cannot_be_used_are_left_out_on_request(tmp_path, caplog):
    settings = {**PLAIN, "reading": Reading(drop_invalid=True)}
    meta = tmp_path / "meta_x.json"
    lines = [
        *('{"asin": "a", "title": "A"}', '{"asin": "b", "title": 7}', '{"asin": "c", "ti'),
        *('{"asin": "d", "title": "\\ud800"}', '{"asin": "e", "title": "E"}'),
    ]
    meta.write_text("\n".join(lines))
    path = tmp_path / "x.csv"
    path.write_text(
        "a,u,5,1300000000\na,u,5\nb,u,5,1300000001\n,u,5,1300000002\ne,v,5,1300000003\n"
    )
    files = {"interactions": path, "catalogue": meta}
    with pytest.raises(UserError, match="x.csv, row 2 has 3 fields"):
        read_raw("amazon_2018", files, **PLAIN)
    catalogue, interactions = read_raw("amazon_2018", files, **settings)
    assert catalogue.titles == ("A", "E")
    assert interactions.timestamp.tolist() == [1300000000, 1300000003]
    assert "Dropped 1 rows: " + str(path) + ", row 2 has 3 fields" in caplog.text
    assert f"{path}, row 4: item is ''" in caplog.text  # its row in the file
    assert f"Dropped 3 lines: {meta}, line 2: title is 7, expected text" in caplog.text


def test_values_that_real_files_have(tmp_path):
    games = tmp_path / "games.json"
    games.write_text("{'id': '1', 'title': '', 'app_name': 'Game', 'genres': ['A', None, 'B']}\n")
    path = tmp_path / "reviews.json"
    path.write_text("{'username': 'u', 'product_id': '1', 'date': '2017-01-02'}\n")
    settings = {**PLAIN, "texts": ItemTexts(("category",))}
    files = {"interactions": path, "catalogue": games}
    catalogue, _ = read_raw("steam", files, **settings)
    assert (catalogue.titles, catalogue.attributes) == (("Game",), {"category": ("A, B",)})
    movies = tmp_path / "movies.dat"
    movies.write_text("1::Usual Suspects, The (1995) ::Crime\n")
    (tmp_path / "ratings.dat").write_text("1::1::5::1300000000\n")
    files = {"interactions": tmp_path / "ratings.dat", "catalogue": movies}
    catalogue, _ = read_raw("movielens", files, **{**PLAIN, "texts": ItemTexts(("year",))})
    assert (catalogue.titles, catalogue.attributes["year"]) == (
        ("The Usual Suspects (1995)",),
        ("1995",),
    )
    shelves = tmp_path / "shelves.json"
    row = '{"user_id": "u", "book_id": "1", "date_added": "%s"}\n'
    shelves.write_text(row % "" + row % "Fri Aug 25 13:55:02 -0700 2017" + row % "2017-01-01")
    books = tmp_path / "books.json"
    books.write_text('{"book_id": "1", "title": "Book"}\n')
    with pytest.raises(UserError, match="line 1: date_added is '', expected a date and time"):
        read_raw("goodreads", {"interactions": shelves, "catalogue": books}, **PLAIN)


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.rating_column is set, but data.source=steam has no"):
        read(MADE["Steam"], tmp_path, ratings=True)
    with pytest.raises(UserError, match="data.rating_column is 'stars': .*has 'rating' or none"):
        prepare({"source": "yelp", "rating_column": "stars"}, tmp_path / "data")
    with pytest.raises(UserError, match="data.attributes needs data.catalogue"):
        prepare({"source": "lastfm", "attributes": ("brand",)}, tmp_path / "data")
    with pytest.raises(UserError, match="data.attributes is 'year': expected one of 'brand', 'cat"):
        read(MADE["Amazon 2018"], tmp_path, texts=ItemTexts(("year",)))
    files = {"interactions": MADE["Amazon 2018"].interactions(tmp_path)}
    files["catalogue"] = tmp_path / "meta.json"
    files["catalogue"].write_text('{"asin": "none of them", "title": "x"}\n')
    with pytest.raises(UserError, match=r"meta.json: none of its items occurs"):
        read_raw("amazon_2018", files, **PLAIN)
    with pytest.raises(UserError, match="data.source=amazon_2023 reads files that end in"):
        read_raw("amazon_2023", files, **PLAIN)


TYPES = {"a": TEXT, "t": WHOLE, "x": NUMBER}


def _oracle(data):
    """The rows and lines of JSON lines, or None for a file that should be refused."""

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs) and {"a", "t", "x"} & {n for n, _ in pairs}:
            raise ValueError("twice")
        return found

    rows = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError):
            return None
        kinds = {"a": str, "t": int, "x": (int, float)}
        if not isinstance(row, dict) or any(
            row.get(n) is not None and (not isinstance(row[n], k) or isinstance(row[n], bool))
            for n, k in kinds.items()
        ):
            return None
        rows.append((number, row.get("a"), row.get("t"), row.get("x")))
    return rows or None


def rows_or_error(path, types=TYPES):
    """(line, value, ..) of every object, or what is said of the file."""
    try:
        table, lines = read_lines(path, types)
    except UserError as error:
        return str(error)
    columns = (lines.tolist(), *(table[name].to_pylist() for name in types))
    return list(zip(*columns, strict=True))


def test_mutated_lines_are_read_as_the_oracle_reads_them_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tca4rec_jax.data.raw.lines._BLOCK", 64)
    choose, path, refused = random.Random(0), tmp_path / "x.json", 0
    whole = b"".join(
        json.dumps({"a": f"i{n}", "o": {"b": [n]}, "t": n, "x": n / 2}).encode() + b"\n"
        for n in range(6)
    )
    bits = [
        b'"',
        b"{",
        b"}",
        b"\n",
        b"\n\n",
        b"\xff",
        b"1.5",
        b"null",
        b"true",
        b",",
        b"\\",
        b"9" * 30,
    ]
    for _ in range(400):
        data = whole
        for _ in range(choose.choice([0, 1, 1, 2])):
            at, to = sorted(choose.choices(range(len(data) + 1), k=2))
            put = choose.choice(bits)
            data = choose.choice(
                [data[:at] + put + data[at:], data[:at] + put + data[at + len(put) :], data[:at],
                 data[:at] + data[to:]]
            )  # fmt: skip
        path.write_bytes(data)
        expected = _oracle(data)
        found = rows_or_error(path)
        if isinstance(found, str):
            place = r", line \d+|: expected| is empty| has no rows"
            assert re.fullmatch(rf"{path}({place}).*", found)
            assert expected is None or "twice" in found or "2**63" in found, (found, data)
            refused += 1
        else:
            assert found == expected, data
    assert 100 < refused < 350


def test_a_cut_or_a_damaged_gzip_file_is_refused(tmp_path):
    path = MADE["Amazon 2018"].interactions(tmp_path)
    whole, choose = path.read_bytes(), random.Random(0)
    rows = rows_or_error(path, {"asin": TEXT})
    refused = 0
    for number in range(30):
        at = choose.randrange(len(whole))
        path.write_bytes(whole[:at] if number % 2 else whole[:at] + b"\0\0\0" + whole[at + 3 :])
        found = rows_or_error(path, {"asin": TEXT})
        assert found == rows or re.fullmatch(rf"{path}.*", found)
        refused += found != rows
    assert refused > 25


@pytest.mark.parametrize("name", MADE)
def test_a_format_is_a_config_of_the_builder_with_its_citation(tmp_path, name):
    made = MADE[name]
    config = {"source": made.source, "history_length": 1, "encoding": made.encoding}
    config["interactions"] = str(made.interactions(tmp_path))
    if made.catalogue:
        config["catalogue"] = str(made.catalogue(tmp_path))
    written = prepare(config, tmp_path / "data")
    form = FORMATS[made.source]
    folder = tmp_path / "data" / "rec_sequences" / made.source / form.version
    info = tfds.builder_from_directory(str(folder)).info
    assert (info.citation, info.homepage) == (form.citation, form.homepage)
    assert info.full_name == f"rec_sequences/{made.source}/{form.version}"
    data = load(tmp_path / "data", config)
    assert data.catalogue == written.catalogue
    assert data.splits["test"].content_hash() == written.splits["test"].content_hash()


def _rows(events, *, days, user_core, item_core):
    """Rows of (user, items) in a window and a core: numbered ties, a history of 1 to 3, 8:1:1."""
    last = max(event.time for event in events)
    events = [event for event in events if event.time > last - days * DAY]
    while True:
        users, items = Counter(e.user for e in events), Counter(e.item for e in events)
        kept = [e for e in events if users[e.user] >= user_core and items[e.item] >= item_core]
        if len(kept) == len(events):
            break
        events = kept
    events = sorted(events, key=lambda e: (e.time, e.user, e.item))
    users, items = ([*dict.fromkeys(e[column] for e in events)] for column in (0, 1))
    events.sort(key=lambda e: (e.time, users.index(e.user), items.index(e.item)))
    rows, histories = [], {}
    for event in events:
        history = histories.setdefault(event.user, [])
        if history:
            rows.append((event.user, [*history[-3:], event.item]))
        history.append(event.item)
    first, second = int(0.8 * len(rows)), int(0.8 * len(rows)) + int(0.1 * len(rows))
    return rows[:first], rows[first:second], rows[second:]


@pytest.mark.parametrize("name", MADE)
def test_every_format_goes_through_to_the_rows_of_a_plain_reading(tmp_path, name):
    made = MADE[name]
    filters = {"last_days": 10, "user_core": 5, "item_core": 11}  # a core of 3 to 5 rounds
    config = {"source": made.source, "history_length": 3, "min_history": 1, "filters": filters}
    config |= {"ties": "numbered", "round_split": "down", "encoding": made.encoding}
    config["interactions"] = str(made.interactions(tmp_path))
    events = [event for event in EVENTS if not made.catalogue or event.item not in ("3", "404")]
    if made.catalogue:
        config["catalogue"] = str(made.catalogue(tmp_path))
    if made.ratings:
        config["rating_column"] = "rating"
        filters["min_rating"] = 2
        events = [event for event in events if event.rating >= 2]
    expected = _rows(events, days=10, user_core=5, item_core=11)
    data = prepare(config, tmp_path / "data")
    for split, rows in zip(("train", "validation", "test"), expected, strict=True):
        found = data.splits[split]
        ids = [[data.catalogue.item_ids[item] for item in found[row]] for row in range(len(found))]
        assert list(zip((data.user_ids[user] for user in found.user), ids, strict=True)) == rows
    steps = [tuple(step.values())[1:] for step in steps_of(tmp_path / "data")]
    assert steps[0] == (*(len({event[at] for event in EVENTS}) for at in (0, 1)), len(EVENTS))
    assert len({*steps}) >= 3
    assert steps[-1][2] < steps[-2][2]  # the core


def _mutant(choose, data):
    """Cut, or with bytes put in, taken out or changed."""
    bits = [
        b'"',
        b"'",
        b"\\",
        b",",
        b"\t",
        b"\n",
        b"\0",
        b"\xe9",
        b"::",
        b"{",
        b"[",
        b"null",
        b"9" * 30,
    ]
    for _ in range(choose.choice([1, 1, 2])):
        at, put = choose.randrange(len(data) + 1), choose.choice(bits)
        ends = data[at:], data[at + 1 :], data[at + choose.randrange(99) :], b""
        data = data[:at] + choose.choice([put, b""]) + choose.choice(ends)
    return data


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("drop_invalid", [False, True])
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, name, drop_invalid):
    made, choose = MADE[name], random.Random(name)
    files = {"interactions": made.interactions(tmp_path)}
    if made.catalogue:
        files["catalogue"] = made.catalogue(tmp_path)
    settings = {**PLAIN, "reading": Reading(made.encoding, drop_invalid), "report": Report()}
    refused = 0
    for _ in range(15):
        role = choose.choice([*files])
        path = tmp_path / f"mutant_{files[role].name}".removesuffix(".gz")
        data = files[role].read_bytes()
        data = gzip.decompress(data) if files[role].suffix == ".gz" else data
        path.write_bytes(_mutant(choose, data))
        try:
            read_raw(made.source, {**files, role: path}, **settings)
        except UserError as error:
            refused += 1
            message = str(error)
            assert re.fullmatch(rf".*({tmp_path}|after items with a title).*", message)
    assert 0 < refused <= 15 if not drop_invalid else refused < 15
