"""Downloaded files -> a catalogue of the items that occur and have a title, and interactions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.filters import Report
from tca4rec_jax.data.interactions import Interactions, catalogue_of, interactions_of
from tca4rec_jax.data.raw.columns import Layout
from tca4rec_jax.data.raw.formats import FORMATS
from tca4rec_jax.data.raw.published_titles import MARKER, published_text
from tca4rec_jax.data.table_files import kind_of
from tca4rec_jax.data.tables import CONTROL, Reading, Table, usable_rows
from tca4rec_jax.errors import UserError, check_choice

_NO_TITLE = ("", "unknown", "None")  # by the published rules; else '' alone


class ItemTexts(NamedTuple):
    """Which texts of an item are read, and how.

    Attributes:
      attributes: names of columns.
      needed: those of them without which an item is left out.
      most: characters of a title; the rest is cut; 0 keeps all.
      published: cut first, then cleaned as `published_text` does, the needed attributes too.
    """

    attributes: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    most: int = 0
    published: bool = False


def read_raw(
    source: str,
    files: Mapping[str, Path],
    *,
    reading: Reading,
    texts: ItemTexts,
    report: Report,
    ratings: bool = False,
) -> tuple[Catalogue, Interactions]:
    """What the files 'interactions' and 'catalogue' of a format in FORMATS hold.

    The catalogue has the items that occur, are described and have a title, in the order of their
    ids; interactions with others are left out, which is logged. Of an item that is described more
    than once the first line counts. Without a 'catalogue', which only 'lastfm' may lack, an item's
    title is its id. The report gets what was there, and what is left.

    Raises UserError, naming file and line, for what is no such file, and for attributes or ratings
    that the format has not.
    """
    form = FORMATS[source]
    interactions, item_ids = _interactions(source, files["interactions"], ratings, reading)
    report.add("in the file", interactions)
    if (path := files.get("catalogue")) is None:
        ids = np.sort(item_ids)
        catalogue = catalogue_of(files["interactions"], ids, ids, texts.most)
    else:
        layout = _layout(source, path, form.items)
        for name in texts.attributes:
            check_choice("data.attributes", name, sorted({*layout.columns} - {"item", "title"}))
        table = layout.read(path, ("item", "title", *texts.attributes), reading)
        table = _titled(table, item_ids, texts)
        catalogue = usable_rows(table, lambda t: _catalogue(t, texts), reading.drop_invalid)
    item_n = catalogue.find(item_ids)[interactions.item]
    if missing := int((item_n < 0).sum()):
        logging.warning(
            "%d of %d interactions are with %d items that have no title: left out",
            *(missing, len(item_n), len(item_ids) - catalogue.num_items),
        )
    interactions = replace(interactions, item=item_n).take(item_n >= 0)
    report.add("items with a title", interactions)
    return catalogue, interactions


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
    return usable_rows(layout.read(path, wanted, reading), read, reading.drop_invalid)


def _catalogue(table: Table, texts: ItemTexts) -> Catalogue:
    """In the order of the ids."""
    ids = table.ids("item")
    titles = table.texts("title").to_numpy() if texts.published else table.titles("title")
    order = pc.sort_indices(pa.array(ids)).to_numpy()
    attributes = {
        name: tuple(map(values.__getitem__, order))
        for name, values in table.attributes(texts.attributes).items()
    }
    most = 0 if texts.published else texts.most
    columns = ids[order], titles[order], most, attributes
    return catalogue_of(table.path, *columns, keep_spaces=texts.published)


def _layout(source: str, path: Path, layouts: Mapping[str, Layout]) -> Layout:
    if (kind := kind_of(path)) not in layouts:
        raise UserError(
            f"{path}: data.source={source} reads files that end in {' or '.join(layouts)}, perhaps "
            "with .gz behind it (docs/data.md says which)"
        )
    return layouts[kind]


def _titled(table: Table, item_ids: np.ndarray, texts: ItemTexts) -> Table:
    """The rows of these items that have a title, of an item the first; titles in one line."""
    given_n = pc.fill_null(table.columns["title"], "")
    no_title = _NO_TITLE if texts.published else _NO_TITLE[:1]
    named_n = pc.invert(pc.is_in(given_n, value_set=pa.array(no_title, given_n.type)))
    id_n = pc.utf8_trim_whitespace(pc.fill_null(table.columns["item"], ""))
    used_n = pc.is_in(id_n, value_set=pa.array(item_ids, id_n.type))
    table = table.without(~np.asarray(pc.and_(used_n, named_n), bool))
    if texts.published:
        table = _cleaned(table, texts)
        title_n = table.columns["title"]
    else:
        title_n = pc.replace_substring_regex(table.columns["title"], CONTROL, " ")
        title_n = pc.utf8_trim_whitespace(title_n)
    kept_n = np.asarray(pc.not_equal(title_n, ""), bool)
    for name in texts.needed:
        kept_n &= [text != "" for text in table.attributes([name])[name]]
    id_n = pc.utf8_trim_whitespace(table.columns["item"])
    kept_n &= ~pd.Series(id_n).where(kept_n).duplicated().to_numpy()
    if not kept_n.any():
        raise UserError(
            f"{table.path}: none of its items occurs in the interactions and has a title; are the "
            "two files of one data set?"
        )
    return replace(table, columns={**table.columns, "title": title_n}).without(~kept_n)


def _cleaned(table: Table, texts: ItemTexts) -> Table:
    """Titles and needed attributes as the published preprocessing has them."""
    titles = [published_text(title, texts.most) for title in table.columns["title"].to_pylist()]
    columns = {**table.columns, "title": pa.array(titles, pa.large_string())}
    for name, values in table.attributes(texts.needed).items():
        cleaned = map(published_text, values)
        kept = ["" if text == MARKER else text for text in cleaned]
        columns[name] = pa.array(kept, pa.large_string())
    return replace(table, columns=columns)
