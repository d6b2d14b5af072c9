"""The downloaded files by data.source: which columns they have, and whom to cite for them.

What a format's files are called and where they come from: docs/data.md.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tca4rec_jax.data.raw.columns import (
    NUMBER,
    PATHS,
    TEXTS,
    WHOLE,
    Column,
    Layout,
    Lines,
    first_path,
    first_text,
    iso_date,
    movie_title,
    movie_year,
    named_flags,
    of,
    spaced,
    year,
)
from tca4rec_jax.data.table_files import Delimited

_JSON, _PYTHON = Lines(), Lines(python=True)
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip


class RawFormat(NamedTuple):
    """A data set as people download it: the layouts of its two files by their suffix."""

    interactions: Mapping[str, Layout]
    items: Mapping[str, Layout]
    description: str
    homepage: str
    citation: str
    version: str = "1.0.0"  # of the rows that are made of the same files


def _rated(user: str, item: str, rating: str, time: str) -> dict[str, Column]:
    return {"user": of(user), "item": of(item), "timestamp": of(time), "rating": of(rating)}


def _reviews(user: str, item: str, rating: str, time: str) -> Layout:
    rated = _rated(user, item, rating, time)
    numbers = {"timestamp": of(time, kind=WHOLE), "rating": of(rating, kind=NUMBER)}
    return Layout(_JSON, rated | numbers)


def _ratings(names: str, grammar: Delimited) -> Layout:
    """A table without a header whose columns are named so."""
    return Layout(grammar._replace(names=tuple(names.split())), _rated(*_COMMON))


_COMMON = ("user", "item", "rating", "timestamp")

AMAZON_2014 = RawFormat(
    {
        ".json": _reviews("reviewerID", "asin", "overall", "unixReviewTime"),
        ".csv": _ratings("user item rating timestamp", Delimited(",")),
    },
    {
        ".json": Layout(
            _PYTHON,
            {
                "item": of("asin"),
                "title": of("title"),
                "brand": of("brand"),
                "category": of("categories", kind=PATHS, make=first_path),
            },
        )
    },
    "Amazon reviews, May 1996 to July 2014",
    "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
    "He and McAuley, Ups and downs: Modeling the visual evolution of fashion trends with "
    "one-class collaborative filtering, WWW 2016",
)

AMAZON_2018 = RawFormat(
    {
        ".json": _reviews("reviewerID", "asin", "overall", "unixReviewTime"),
        ".csv": _ratings("item user rating timestamp", Delimited(",")),
    },
    {
        ".json": Layout(
            _JSON,
            {
                "item": of("asin"),
                "title": of("title"),
                "brand": of("brand"),
                "category": of("category", kind=TEXTS),
            },
        )
    },
    "Amazon reviews, May 1996 to October 2018",
    "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2",
    "Ni, Li and McAuley, Justifying recommendations using distantly-labeled reviews and "
    "fine-grained aspects, EMNLP 2019",
)

AMAZON_2023 = RawFormat(
    {
        ".jsonl": _reviews("user_id", "parent_asin", "rating", "timestamp"),
        ".csv": Layout(Delimited(","), _rated("user_id", "parent_asin", "rating", "timestamp")),
    },
    {
        ".jsonl": Layout(
            _JSON,
            {
                "item": of("parent_asin"),
                "title": of("title"),
                "brand": of("store"),
                "category": of("categories", kind=TEXTS),
            },
        )
    },
    "Amazon reviews, May 1996 to September 2023",
    "https://amazon-reviews-2023.github.io",
    "Hou, Li, He, Yan, Chen and McAuley, Bridging language and items for retrieval and "
    "recommendation, arXiv 2403.03952, 2024",
)

_MOVIE = {"title": of("title", make=movie_title), "year": of("title", make=movie_year)}
_GENRE_COLUMN = {"category": of("genres", make=spaced("|"))}

MOVIELENS = RawFormat(
    {
        ".data": _ratings("user item rating timestamp", Delimited("\t", quoted=False)),
        ".dat": _ratings("user item rating timestamp", Delimited("::", quoted=False)),
        ".csv": Layout(Delimited(","), _rated("userId", "movieId", "rating", "timestamp")),
    },
    {
        ".item": Layout(
            Delimited(
                "|",
                quoted=False,
                names=("item", "title", "release", "video_release", "address", *_GENRES),
            ),
            {"item": of("item"), **_MOVIE, "category": of(*_GENRES, make=named_flags(_GENRES))},
        ),
        ".dat": Layout(
            Delimited("::", quoted=False, names=("item", "title", "genres")),
            {"item": of("item"), **_MOVIE, **_GENRE_COLUMN},
        ),
        ".csv": Layout(Delimited(","), {"item": of("movieId"), **_MOVIE, **_GENRE_COLUMN}),
    },
    "MovieLens 100K, 1M, 10M, 20M, 25M and 32M",
    "https://grouplens.org/datasets/movielens",
    "Harper and Konstan, The MovieLens datasets: History and context, ACM Transactions on "
    "Interactive Intelligent Systems 5(4), 2015",
)

STEAM = RawFormat(
    {
        ".json": Layout(
            _PYTHON,
            {"user": of("username"), "item": of("product_id"), "timestamp": of("date")},
        )
    },
    {
        ".json": Layout(
            _PYTHON,
            {
                "item": of("id"),
                "title": of("title", "app_name", make=first_text),
                "brand": of("developer"),
                "category": of("genres", kind=TEXTS),
                "year": of("release_date", make=year),
            },
        )
    },
    "Reviews on Steam, October 2010 to January 2018",
    "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
    "Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018",
)

LASTFM = RawFormat(
    {
        ".dat": Layout(
            Delimited("\t", quoted=False),
            {"user": of("userID"), "item": of("artistID"), "timestamp": of("timestamp")},
        ),
        ".tsv": Layout(
            Delimited(
                "\t",
                quoted=False,
                names=("user", "timestamp", "artist_id", "artist", "track_id", "track"),
            ),
            {"user": of("user"), "item": of("artist"), "timestamp": of("timestamp")},
        ),
    },
    {".dat": Layout(Delimited("\t", quoted=False), {"item": of("id"), "title": of("name")})},
    "Last.fm: tags of artists (HetRec 2011), or what 1,000 users listened to (1K)",
    "https://grouplens.org/datasets/hetrec-2011",
    "Cantador, Brusilovsky and Kuflik, Second workshop on information heterogeneity and fusion in "
    "recommender systems, RecSys 2011; Celma, Music recommendation and discovery, Springer 2010",
)

YELP = RawFormat(
    {
        ".json": Layout(
            _JSON,
            {
                "user": of("user_id"),
                "item": of("business_id"),
                "timestamp": of("date"),
                "rating": of("stars", kind=NUMBER),
            },
        )
    },
    {
        ".json": Layout(
            _JSON,
            {
                "item": of("business_id"),
                "title": of("name"),
                "category": of("categories"),
                "city": of("city"),
                "state": of("state"),
            },
        )
    },
    "Reviews of businesses on Yelp",
    "https://business.yelp.com/data/resources/open-dataset",
    "Yelp open dataset",
)

GOODREADS = RawFormat(
    {
        ".json": Layout(
            _JSON,
            {
                "user": of("user_id"),
                "item": of("book_id"),
                "timestamp": of("date_added", make=iso_date),
                "rating": of("rating", kind=NUMBER),
            },
        )
    },
    {
        ".json": Layout(
            _JSON,
            {
                "item": of("book_id"),
                "title": of("title"),
                "year": of("publication_year"),
                "brand": of("publisher"),
            },
        )
    },
    "Books on the shelves of Goodreads, until November 2017",
    "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html",
    "Wan and McAuley, Item recommendation on monotonic behavior chains, RecSys 2018",
)

FORMATS = {
    "amazon_2014": AMAZON_2014,
    "amazon_2018": AMAZON_2018,
    "amazon_2023": AMAZON_2023,
    "movielens": MOVIELENS,
    "steam": STEAM,
    "lastfm": LASTFM,
    "yelp": YELP,
    "goodreads": GOODREADS,
}
