"""A small made data set, written as each of the downloaded formats has it."""

import gzip
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

DAY = 86400
FIRST = 1_300_000_000 // DAY * DAY  # midnight, 13 March 2011


class Item(NamedTuple):
    id: str
    title: str  # '' if the files have none
    brand: str
    genres: tuple[str, ...]
    year: str


class Event(NamedTuple):
    user: str
    item: str
    rating: int
    time: int  # seconds


ITEMS = [
    Item("7", "Usual Suspects", "Acme", ("Crime", "Drama"), "1995"),
    Item("12", "Tom & Jerry: 'Caf\u00e9' \\ \"quoted\"", "", ("Comedy",), "1963"),
    Item("3", "", "Nameless", ("War",), "1999"),
    Item("101", "Up, up", "O'Neil", (), "2009"),
    Item("5", "A third", "Acme", ("Drama",), "2010"),
    Item("21", "unknown", "Acme", ("War",), "2001"),
    Item("9", "Never chosen", "Acme", ("Drama",), "2011"),
]


def made_events(seed: int = 0, count: int = 160) -> list[Event]:
    """Of 14 users, some of them rare as some items are, on 12 days, so that many share a time; five
    of them twice; one of an unknown item."""
    choose = random.Random(seed)
    items = [item.id for item in ITEMS if item.title != "Never chosen"]
    items += [items[0], items[4]] * 2
    events = [
        Event(
            f"{int(14 * choose.random() ** 2) * 11}", choose.choice(items), choose.randint(1, 5), 0
        )
        for _ in range(count)
    ]
    events = [event._replace(time=FIRST + choose.randrange(12) * DAY) for event in events]
    return [*events, *events[:5], events[0]._replace(item="404")]


EVENTS = made_events()


def _text(name: str, lines: list[str], end: str = "\n", encoding: str = "utf-8"):
    def write(folder: Path) -> Path:
        data = end.join([*lines, ""]).encode(encoding)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return folder / name

    return write


def _json(name: str, rows: list[dict], dumps: Callable[[dict], str] = json.dumps):
    return _text(name, [*map(dumps, rows[:3]), "", *map(dumps, rows[3:])])  # and an empty line


def _date(event: Event, form: str) -> str:
    return datetime.fromtimestamp(event.time, UTC).strftime(form)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _movie(item: Item) -> str:
    """As the files have it: the article behind, the year in brackets."""
    return f"{item.title}, The ({item.year})"


def _reviews(name: str, user: str, item: str, rating: str, time: str, ticks: int = 1):
    rows = [
        {user: e.user, "text": 'a "b" \\ {} \u00e9', item: e.item, rating: float(e.rating)}
        | {time: e.time * ticks, "helpful": [1, 2], "vote": None if e.rating > 2 else "3"}
        for e in EVENTS
    ]
    return _json(name, rows)


def _amazon_meta(name: str, fields: Callable[[Item], dict], dumps=json.dumps):
    """Items without a title lack it; the second line repeats an item under another title."""
    rows = [{**fields(item), **({"title": item.title} if item.title else {})} for item in ITEMS]
    rows.insert(3, {**rows[0], "title": "Another title of the first"})
    return _json(name, rows, dumps)


_MOVIES = [item for item in ITEMS if item.title]
_FLAGS = ("Comedy", "Crime", "Drama", "War")  # at 5, 6, 8 and 17 of the 19 genres
_AT = dict(zip(_FLAGS, (5, 6, 8, 17), strict=True))


def _flags(item: Item) -> str:
    return "|".join(str(int(any(_AT[g] == at for g in item.genres))) for at in range(19))


def _events(pattern: str) -> list[str]:
    return [pattern.format(**event._asdict()) for event in EVENTS]


def _goodreads(events: list[Event]) -> list[dict]:
    rows = []
    for number, e in enumerate(events):  # of the same moments, in two zones
        shifted = e._replace(time=e.time - 8 * 3600) if number % 2 else e
        zone = "-0800" if number % 2 else "+0000"
        date = _date(shifted, f"%a %b %d %H:%M:%S {zone} %Y")
        rows.append({"user_id": e.user, "book_id": e.item, "rating": e.rating, "date_added": date})
    return rows


class Made(NamedTuple):
    """One way to write the made data; what is not in the format is not in `attributes`."""

    source: str
    interactions: Callable[[Path], Path]
    catalogue: Callable[[Path], Path] | None
    attributes: tuple[str, ...] = ("brand", "category")
    ratings: bool = True
    ticks: int = 1  # per second
    title: Callable[[Item], str] = lambda item: item.title
    encoding: str = "utf-8"


def _of_movies(item: Item) -> str:
    return f"The {item.title} ({item.year})"


def _with_path(item: Item) -> dict:
    paths = [list(item.genres), ["Other", "Path"]] if item.genres else []
    return {"asin": item.id, "brand": item.brand, "categories": paths, "related": {"x": ["1"]}}


_ARTICLES = {"attributes": ("category", "year"), "title": _of_movies}

MADE = {
    "Amazon 2014": Made(
        "amazon_2014",
        _reviews("reviews_Toys_5.json.gz", "reviewerID", "asin", "overall", "unixReviewTime"),
        _amazon_meta("meta_Toys.json.gz", _with_path, dumps=repr),
    ),
    "Amazon 2014, ratings": Made(
        "amazon_2014",
        _text("ratings_Toys.csv", _events("{user},{item},{rating}.0,{time}")),
        _amazon_meta("meta_Toys.json.gz", _with_path, dumps=repr),
    ),
    "Amazon 2018": Made(
        "amazon_2018",
        _reviews("Toys.json.gz", "reviewerID", "asin", "overall", "unixReviewTime"),
        _amazon_meta(
            "meta_Toys.json.gz",
            lambda item: {"asin": item.id, "brand": item.brand, "category": list(item.genres)},
        ),
    ),
    "Amazon 2018, ratings": Made(
        "amazon_2018",
        _text("Toys.csv", _events("{item},{user},{rating}.0,{time}")),
        _amazon_meta(
            "meta_Toys.json",
            lambda item: {"asin": item.id, "brand": item.brand, "category": list(item.genres)},
        ),
    ),
    "Amazon 2023": Made(
        "amazon_2023",
        _reviews("Toys.jsonl.gz", "user_id", "parent_asin", "rating", "timestamp", ticks=1000),
        _amazon_meta(
            "meta_Toys.jsonl.gz",
            lambda item: {
                "parent_asin": item.id,
                "store": item.brand or None,
                "categories": list(item.genres),
                "details": {"x": {"y": 1}},
            },
        ),
        ticks=1000,
    ),
    "Amazon 2023, ratings": Made(
        "amazon_2023",
        _text(
            "Toys.csv.gz",
            [
                "user_id,parent_asin,rating,timestamp",
                *_events("{user},{item},{rating}.0,{time}000"),
            ],
        ),
        _amazon_meta(
            "meta_Toys.jsonl",
            lambda item: {
                "parent_asin": item.id,
                "store": item.brand,
                "categories": list(item.genres),
            },
        ),
        ticks=1000,
    ),
    "MovieLens 100K": Made(
        "movielens",
        _text("u.data", _events("{user}\t{item}\t{rating}\t{time}")),
        _text(
            "u.item",
            [f"{i.id}|{_movie(i)}|01-Jan-{i.year}||http://x|{_flags(i)}" for i in _MOVIES],
            encoding="latin-1",
        ),
        encoding="latin-1",
        **_ARTICLES,
    ),
    "MovieLens 1M": Made(
        "movielens",
        _text("ratings.dat", _events("{user}::{item}::{rating}::{time}")),
        _text(
            "movies.dat",
            [f"{i.id}::{_movie(i)}::{'|'.join(i.genres)}" for i in _MOVIES],
            encoding="latin-1",
        ),
        encoding="latin-1",
        **_ARTICLES,
    ),
    "MovieLens 20M": Made(
        "movielens",
        _text(
            "ratings.csv",
            ["userId,movieId,rating,timestamp", *_events("{user},{item},{rating}.0,{time}")],
            end="\r\n",
        ),
        _text(
            "movies.csv",
            [
                "movieId,title,genres",
                *(f"{i.id},{_quoted(_movie(i))},{'|'.join(i.genres)}" for i in _MOVIES),
            ],
        ),
        **_ARTICLES,
    ),
    "Steam": Made(
        "steam",
        _json(
            "steam_reviews.json.gz",
            [
                {"username": e.user, "hours": 1.5, "product_id": e.item, "early_access": False}
                | {"date": _date(e, "%Y-%m-%d"), "text": "it's \u00e9"}
                for e in EVENTS
            ],
            dumps=lambda row: repr(row).replace("'product_id'", "u'product_id'"),
        ),
        _json(
            "steam_games.json.gz",
            [
                {"id": i.id, "developer": i.brand, "genres": list(i.genres)}
                | {"release_date": f"{i.year}-02-03"}
                | ({"app_name" if i.id == "7" else "title": i.title} if i.title else {})
                for i in ITEMS
            ],
            dumps=repr,
        ),
        attributes=("brand", "category", "year"),
        ratings=False,
        ticks=10**6,
    ),
    "LastFM, HetRec": Made(
        "lastfm",
        _text(
            "user_taggedartists-timestamps.dat",
            ["userID\tartistID\ttagID\ttimestamp", *_events("{user}\t{item}\t13\t{time}000")],
            end="\r\n",
        ),
        _text(
            "artists.dat",
            ["id\tname\turl\tpictureURL", *(f"{i.id}\t{i.title}\thttp://x\t" for i in _MOVIES)],
        ),
        attributes=(),
        ratings=False,
        ticks=1000,
    ),
    "LastFM 1K": Made(
        "lastfm",
        _text(
            "userid-timestamp-artid-artname-traid-traname.tsv",
            [f'{e.user}\t{_date(e, "%Y-%m-%dT%H:%M:%SZ")}\t\t{e.item}\t\tA "track' for e in EVENTS],
        ),
        None,
        attributes=(),
        ratings=False,
        ticks=10**6,
        title=lambda item: item.id,
    ),
    "Yelp": Made(
        "yelp",
        _json(
            "yelp_academic_dataset_review.json",
            [
                {"review_id": "x", "user_id": e.user, "business_id": e.item}
                | {"stars": float(e.rating), "date": _date(e, "%Y-%m-%d %H:%M:%S")}
                for e in EVENTS
            ],
        ),
        _json(
            "yelp_academic_dataset_business.json",
            [
                {"business_id": i.id, "name": i.title, "categories": ", ".join(i.genres) or None}
                for i in ITEMS
            ],
        ),
        attributes=("category",),
        ticks=10**6,
    ),
    "Goodreads": Made(
        "goodreads",
        _json("goodreads_interactions_poetry.json.gz", _goodreads(EVENTS)),
        _json(
            "goodreads_books_poetry.json.gz",
            [
                {"book_id": i.id, "title": i.title, "publication_year": i.year}
                | {"publisher": i.brand, "authors": [{"author_id": "1", "role": ""}]}
                for i in ITEMS
            ],
        ),
        attributes=("brand", "year"),
        ticks=10**6,
    ),
}


def attribute(item: Item, name: str) -> str:
    """What an item has, by the name in data.attributes."""
    return ", ".join(item.genres) if name == "category" else getattr(item, name)


def steps_of(data_dir: Path) -> list[dict]:
    """What every step of the preparation left."""
    return json.loads((data_dir / "statistics.json").read_text())["steps"]
