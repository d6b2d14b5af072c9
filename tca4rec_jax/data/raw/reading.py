"""Downloaded files -> a catalogue of the items that occur and have a title, and interactions."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import Interactions, catalogue_of, interactions_of
from tca4rec_jax.data.raw.columns import Layout
from tca4rec_jax.data.raw.formats import FORMATS
from tca4rec_jax.data.table_files import kind_of
from tca4rec_jax.data.tables import CONTROL, Reading, Table, usable_rows
from tca4rec_jax.errors import UserError, check_choice

_NO_TITLE = ("", "unknown", "None")  # as Amazon's files have it


def read_raw(
    source: str,
    files: Mapping[str, Path],
    *,
    attributes: Collection[str] = (),
    ratings: bool = False,
    reading: Reading,
    max_title_length: int = 0,
) -> tuple[Catalogue, Interactions]:
    """What the files 'interactions' and 'catalogue' of a format in FORMATS hold.

    The catalogue has the items that occur, are described and have a title, in the order of their
    ids; interactions with others are left out, which is logged. Of an item that is described more
    than once the first line counts. Without a 'catalogue', which only 'lastfm' may lack, an item's
    title is its id.

    Raises UserError, naming file and line, for what is no such file, and for attributes or ratings
    that the format has not.
    """
    form = FORMATS[source]
    interactions, item_ids = _interactions(source, files["interactions"], ratings, reading)
    if (path := files.get("catalogue")) is None:
        ids = np.sort(item_ids)
        catalogue = catalogue_of(files["interactions"], ids, ids, 0)
    else:
        layout = _layout(source, path, form.items)
        for name in attributes:
            check_choice("data.attributes", name, sorted({*layout.columns} - {"item", "title"}))
        table = layout.read(path, ("item", "title", *attributes), reading.encoding)
        catalogue = _catalogue(_titled(table, item_ids), attributes, max_title_length)
    item_n = catalogue.find(item_ids)[interactions.item]
    if missing := int((item_n < 0).sum()):
        logging.warning(
            "%d of %d interactions are with %d items that have no title: left out",
            *(missing, len(item_n), len(item_ids) - catalogue.num_items),
        )
    return catalogue, replace(interactions, item=item_n).take(item_n >= 0)


def _interactions(
    source: str, path: Path, ratings: bool, reading: Reading
) -> tuple[Interactions, np.ndarray]:
    """The interactions, whose items are indices into these ids (object)."""
    layout = _layout(source, path, FORMATS[source].interactions)
    if ratings and "rating" not in layout.columns:
        raise UserError(f"data.rating_column is set, but data.source={source} has no ratings")

    def read(table: Table) -> tuple[Interactions, np.ndarray]:
        item_n, item_ids = table.codes("item")
        return interactions_of(table, item_n), item_ids

    wanted = [name for name in layout.columns if ratings or name != "rating"]
    return usable_rows(layout.read(path, wanted, reading.encoding), read, reading.drop_invalid)


def _catalogue(table: Table, attributes: Collection[str], max_title_length: int) -> Catalogue:
    """In the order of the ids."""
    ids, titles = table.ids("item"), table.titles("title")
    order = np.argsort(ids)
    texts = {
        name: tuple(map(texts.__getitem__, order))
        for name, texts in table.attributes(attributes).items()
    }
    return catalogue_of(table.path, ids[order], titles[order], max_title_length, texts)


def _layout(source: str, path: Path, layouts: Mapping[str, Layout]) -> Layout:
    if (kind := kind_of(path)) not in layouts:
        raise UserError(
            f"{path}: data.source={source} reads files that end in {' or '.join(layouts)}, perhaps "
            "with .gz behind it (docs/data.md says which)"
        )
    return layouts[kind]


def _titled(table: Table, item_ids: np.ndarray) -> Table:
    """The rows of these items that have a title, of an item the first; titles in one line."""
    table = table.without(table.columns["item"].is_null().to_numpy(zero_copy_only=False))
    id_n = pc.utf8_trim_whitespace(table.columns["item"].cast(pa.large_string()))
    used_n = pc.is_in(id_n, value_set=pa.array(item_ids, pa.large_string()))
    title_n = pc.replace_substring_regex(table.columns["title"], CONTROL, " ")
    title_n = pc.fill_null(pc.utf8_trim_whitespace(title_n), "")
    named_n = pc.invert(pc.is_in(title_n, value_set=pa.array(_NO_TITLE, title_n.type)))
    kept_n = np.asarray(pc.and_(used_n, named_n), bool)
    kept_n &= ~pd.Series(id_n).where(kept_n).duplicated().to_numpy()
    if not kept_n.any():
        raise UserError(
            f"{table.path}: none of its {len(kept_n)} items occurs in the interactions and has a "
            "title; are the two files of one data set?"
        )
    return replace(table, columns={**table.columns, "title": title_n}).without(~kept_n)
