"""What to read and how to make rows of it: config.data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tca4rec_jax.data.filters import Filters
from tca4rec_jax.data.raw import FORMATS
from tca4rec_jax.data.templates import ITEM_FIELDS
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import (
    Count,
    Encoding,
    Fractions,
    LocalPath,
    Natural,
    NotNegative,
    Rate,
    Samples,
    Seed,
    Text,
    check_fields,
)

_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # by source: needed, optional
    "movielens_100k": ((), ("path",)),
    "files": (("interactions", "catalogue"), ()),
    "sequences": (("interactions",), ("catalogue",)),
    "published": (("path",), ()),
    **dict.fromkeys(FORMATS, (("interactions", "catalogue"), ())),
    "lastfm": (("interactions",), ("catalogue",)),
}
Source = Literal[
    "movielens_100k",
    "files",
    "sequences",
    "published",
    "amazon_2014",
    "amazon_2018",
    "amazon_2023",
    "movielens",
    "steam",
    "lastfm",
    "yelp",
    "goodreads",
]


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to make rows of it.

    Attributes:
      source: 'movielens_100k' (downloaded, or the files in the folder `path`), 'files' (the
        tables `interactions` and `catalogue`), 'sequences' (the same without times: the
        interactions of a user stand in their order; often JSON), 'published' (the layout of the
        published data sets in the folder `path`), or the name of a format in data/raw/formats.py
        (the two files of it that people download, as they come).
      path: a folder, see source.
      interactions: CSV, TSV, JSON-lines or Parquet file with a user, an item and a timestamp per
        row; of 'sequences' also JSON, {user: [item, ..]}, oldest first.
      catalogue: CSV, TSV, JSON-lines or Parquet file with an item and a title per row, or JSON,
        {item: title}; without one an item's title is its id ('sequences' only).
      user_column, item_column, timestamp_column, title_column: names of the columns in those two
        files (the item's column has one name in both).
      rating_column: the column of ratings in the interactions, for recommenders that answer Yes or
        No; of MovieLens and the formats 'rating'. By default none is read.
      liked_above: a rating above this is liked.
      attributes: columns of the catalogue with other texts of an item, which prompts may show:
        {brand} in prompt.item; of MovieLens year and category, of a format those that it has.
      needed_attributes: those of `attributes` without which an item is left out (of formats).
      split_by: 'time' (chronological over all users together), 'leave_one_out' (of every user
        the last item is the target of test, the last but one that of validation) or 'ratio' (of
        every user the last ones are the targets of test, those before of validation).
      history_length: the most items before a target.
      min_history: the fewest; by default history_length, of 'leave_one_out' and 'ratio' 1.
      split: fractions in train, validation and test, in time order: of all rows ('time') or of
        every user's interactions ('ratio').
      round_split: numbers of rows in train and validation by `split` are rounded to the 'nearest',
        or 'down' ('time').
      ties: the order of interactions that share a timestamp: 'shuffled' by `seed`, or 'numbered',
        by user and item as they first occur in the order of times and ids, as published.
      seed: of the order of interactions that share a timestamp.
      cold_items, cold_users: this share of the items that are targets in test, and of its users, is
        kept out of training; drawn by `seed`.
      samples: so many rows of train, validation and test are kept, drawn by `sample_seed`; 0 keeps
        all. train_sequences keeps all of its rows.
      sample_seed: of these rows.
      max_title_length: titles are cut to so many characters; 0 keeps them whole.
      title_spaces: runs of white space in a title are made 'single' spaces, and it has none at its
        ends; 'kept' leaves those of 'published' as they are in the file.
      title_cleaning: of formats: 'none', or as the 'published' preprocessing has it, after the cut:
        quotes and dashes made plain, HTML entities resolved, and the 100 printable characters of
        ASCII instead of a title with others or without letters.
      encoding: of text files; lines of JSON in a downloaded format are UTF-8.
      drop_invalid: leave out rows of these that cannot be used, and log how many and why.
      drop_duplicates: keep one of the interactions of a user, an item and a time.

    What is about making rows has no effect on 'published', whose rows are made; seed, ties and
    drop_duplicates none on 'sequences'.
    """

    source: Source = "movielens_100k"
    path: LocalPath | None = None
    interactions: LocalPath | None = None
    catalogue: LocalPath | None = None
    user_column: Text = "user"
    item_column: Text = "item"
    timestamp_column: Text = "timestamp"
    title_column: Text = "title"
    rating_column: Text | None = None
    liked_above: NotNegative = 3.0
    attributes: tuple[Text, ...] = ()
    needed_attributes: tuple[Text, ...] = ()
    split_by: Literal["time", "leave_one_out", "ratio"] = "time"
    history_length: Count = 10
    min_history: Count | None = None
    split: Fractions = (0.8, 0.1, 0.1)
    round_split: Literal["nearest", "down"] = "nearest"
    ties: Literal["shuffled", "numbered"] = "shuffled"
    seed: Seed = 0
    cold_items: Rate = 0.0
    cold_users: Rate = 0.0
    samples: Samples = (0, 0, 0)
    sample_seed: Seed = 42
    max_title_length: Natural = 100
    title_spaces: Literal["single", "kept"] = "single"
    encoding: Encoding = "utf-8"
    drop_invalid: bool = False
    title_cleaning: Literal["none", "published"] = "none"
    drop_duplicates: bool = False
    filters: Filters = Filters()

    def __post_init__(self):
        if not isinstance(self.filters, Filters):  # the section of a config
            object.__setattr__(self, "filters", Filters(**self.filters))
        check_fields(self, "data.")
        if self.min_history and self.min_history > self.history_length:
            raise UserError(
                f"data.min_history is {self.min_history}: expected at most data.history_length, "
                f"{self.history_length}"
            )
        for name in self.attributes:
            if name in ("item", *ITEM_FIELDS) or {*name} & {*"{}:!"}:
                raise UserError(
                    f"data.attributes has {name!r}: expected names of columns, without braces, "
                    f"colons and exclamation marks, none of item, {', '.join(ITEM_FIELDS)}"
                )
        if self.attributes and self.catalogue_is_optional and not self.catalogue:
            raise UserError("data.attributes needs data.catalogue")
        if self.rating_column and self.source == "published":
            raise UserError("data.rating_column is set, but data.source=published has no ratings")
        if self.title_spaces == "kept" and self.source != "published":
            raise UserError("data.title_spaces is 'kept': that is for data.source=published only")
        self._check_source()
        object.__setattr__(self, "split", tuple(float(part) for part in self.split))

    @property
    def catalogue_is_optional(self) -> bool:
        """Whether the source has titles only if a catalogue is given."""
        return "catalogue" in _ROLES[self.source][1]

    def _check_source(self) -> None:
        """Raises UserError for what the source does not have."""
        per_user = ("leave_one_out", "ratio")
        possible = {"sequences": per_user, "published": ("time",)}.get(self.source)
        if possible and self.split_by not in possible:
            why = "no times" if self.source == "sequences" else "splits of their own"
            raise UserError(
                f"data.split_by is {self.split_by!r}: data.source={self.source} has {why}, "
                f"expected {' or '.join(map(repr, possible))}"
            )
        if self.source in FORMATS and self.rating_column not in (None, "rating"):
            raise UserError(
                f"data.rating_column is {self.rating_column!r}: data.source={self.source} has "
                "'rating' or none"
            )
        if self.source == "published" and self.filters.on:
            raise UserError("data.filters: data.source=published has rows that are made already")
        if self.source == "sequences" and self.filters.by_time:
            raise UserError(
                "data.filters.since, before and last_days: data.source=sequences has no times"
            )
        if self.filters.min_rating is not None and not self.rating_column:
            raise UserError("data.filters.min_rating needs data.rating_column")
        only_formats = self.needed_attributes or self.title_cleaning != "none"
        if only_formats and self.source not in FORMATS:
            raise UserError(
                "data.needed_attributes and data.title_cleaning are for downloaded files "
                f"({', '.join(FORMATS)}), not for data.source={self.source}"
            )
        if extra := {*self.needed_attributes} - {*self.attributes}:
            raise UserError(f"data.needed_attributes has {sorted(extra)}: expected data.attributes")

    @property
    def least_history(self) -> int:
        """The fewest items before a target."""
        by_time = self.split_by == "time"
        return self.min_history or (self.history_length if by_time else 1)

    @property
    def rating(self) -> dict[str, str]:
        """The column of ratings by its name here; none if they are not read."""
        return {"rating": self.rating_column} if self.rating_column else {}

    def inputs(self) -> dict[str, Path]:
        """The user's folder or files by field, {} if there are none; UserError if one is needed."""
        needed, optional = _ROLES[self.source]
        given = {role: Path(value) for role in needed + optional if (value := getattr(self, role))}
        if not given.keys() >= set(needed):
            fields = " and ".join(f"data.{role}" for role in needed)
            raise UserError(f"data.source={self.source} needs {fields}")
        return given
