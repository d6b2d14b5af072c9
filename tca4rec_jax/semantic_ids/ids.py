"""The semantic ids of a catalogue, and the JSON file that holds them: {item id: [token, ..]}."""

import itertools
import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.table_files import unique_names
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.fileio import read_json, write_text
from tca4rec_jax.provenance import FILE, Provenance

LEVELS = string.ascii_lowercase
"""Names of levels, as in <a_0>, <b_0>, ..; an id has no more."""
_TOKEN = re.compile(r"<[^<>\s]+>")
_SHOWN = 3  # items in a message


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The id of every item, in the catalogue's order. Items may share one.

    Attributes:
      codes: int32, a row an item: its tokens, as indices into `tokens`.
      tokens: all tokens, by level and, within a level, by their numbers; '<a_183>' for example.
    """

    codes: Ragged
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, ids: Sequence[Sequence[str]], item_ids: Sequence[str]) -> "SemanticIds":
        """The ids, a sequence of tokens for each item; `item_ids` name the items in messages.

        Raises UserError for an id of no tokens or more than 26, a token that is not one piece of
        text in <angle brackets>, one that occurs at two levels, and an id that is a proper prefix
        of another.
        """
        level_of: dict[str, int] = {}
        for item, tokens in zip(item_ids, ids, strict=True):
            if not tokens:
                raise UserError(f"the id of item {item!r} is empty: expected at least one token")
            if len(tokens) > len(LEVELS):
                raise UserError(
                    f"the id of item {item!r} has {len(tokens)} tokens: expected at most "
                    f"{len(LEVELS)}"
                )
            for level, token in enumerate(tokens):
                if not _TOKEN.fullmatch(token):
                    raise UserError(
                        f"item {item!r} has the token {token!r}: expected text in angle brackets "
                        "without spaces, such as '<a_183>'"
                    )
                if level_of.setdefault(token, level) != level:
                    raise UserError(
                        f"item {item!r} has the token {token!r} at level {level + 1}, another item "
                        f"at level {level_of[token] + 1}: a token belongs to one level"
                    )
        tokens = tuple(sorted(level_of, key=lambda token: (level_of[token], len(token), token)))
        number = {token: at for at, token in enumerate(tokens)}
        codes = [[number[token] for token in id_] for id_ in ids]
        found = cls(Ragged.of(codes, np.int32), tokens)
        _check_no_prefix(ids, item_ids)
        return found

    def __getitem__(self, item: int) -> tuple[str, ...]:
        """The tokens of an item."""
        return tuple(self.tokens[code] for code in self.codes[item])

    @property
    def texts(self) -> tuple[str, ...]:
        """The id of every item as text."""
        return tuple("".join(self[item]) for item in range(len(self.codes)))


def ids_path(file: str | None, workdir: Path) -> Path:
    """The file of `ids.path`, by default the one of launch/make_ids.py."""
    return Path(file) if file else workdir / "ids" / "ids.json"


def catalogue_ids(path: Path, catalogue: Catalogue) -> SemanticIds:
    """The ids of a catalogue's items, of launch/make_ids.py or anyone else.

    Raises UserError as `read_ids`; StaleError for ids of launch/make_ids.py (those with a
    provenance.json beside them) of another catalogue.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of ids; launch/make_ids.py makes some")
    if (path.parent / FILE).is_file():
        Provenance.load(path.parent).check({"catalogue": catalogue.content_hash()}, path)
    return read_ids(path, catalogue.item_ids)


def read_ids(path: Path, item_ids: Sequence[str]) -> SemanticIds:
    """The ids of the given items from a JSON file, which may hold other items too.

    Raises UserError, naming the file, if it is not JSON of lists of texts, has an item twice, lacks
    one, or as `SemanticIds.of`.
    """
    remedy = "expected {item id: [token, ..]}"
    listed = read_json(path, remedy=remedy, of_pairs=unique_names)
    with reading(path, "file of ids", remedy=remedy):
        missing = [item for item in item_ids if item not in listed]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(item_ids)} items have no id, such as "
                f"{', '.join(map(repr, missing[:_SHOWN]))}; make ids of this catalogue"
            )
        for item in item_ids:
            tokens = listed[item]
            if not isinstance(tokens, list) or not all(isinstance(one, str) for one in tokens):
                raise UserError(f"item {item!r} has {tokens!r}: expected a list of tokens")
        return SemanticIds.of([listed[item] for item in item_ids], item_ids)


def write_ids(path: Path, ids: SemanticIds, item_ids: Sequence[str]) -> None:
    """Writes what `read_ids` reads, an item a line, whole or not at all."""
    lines = (f"{json.dumps(item)}: {json.dumps(list(ids[at]))}" for at, item in enumerate(item_ids))
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _check_no_prefix(ids: Sequence[Sequence[str]], item_ids: Sequence[str]) -> None:
    """Raises UserError if an id is a proper prefix of another: no token says where it ends."""
    ordered = sorted((tuple(id_), item) for id_, item in zip(ids, item_ids, strict=True))
    for (shorter, item), (longer, other) in itertools.pairwise(ordered):
        if len(shorter) < len(longer) and longer[: len(shorter)] == shorter:
            raise UserError(
                f"the id of item {item!r}, {''.join(shorter)}, is a prefix of that of item "
                f"{other!r}, {''.join(longer)}: give both as many tokens"
            )
