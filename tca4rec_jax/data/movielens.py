"""MovieLens-100K (Harper and Konstan 2015) with readable titles.

The files store "Usual Suspects, The" and the year apart; an LLM knows "The Usual Suspects (1995)".
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.interactions import Interactions, catalogue_of, read_interactions
from tca4rec_jax.data.tables import read_table
from tca4rec_jax.errors import check_choice

INTERACTIONS_FILE = "ml-100k.inter"
ITEMS_FILE = "ml-100k.item"

ATTRIBUTES = {"year": "release_year", "category": "class"}  # by their columns

_ARTICLES = "The|A|An|Le|La|Les|L'|Un|Une|Il|Lo|Gli|El|Los|Las|Der|Die|Das|Det|Den|De|Het|O|Os"
_TRAILING_ARTICLE = re.compile(rf"^(.+), ({_ARTICLES})$")
_ALTERNATIVES = re.compile(r"((?: \([^()]+\))*)$")
_YEAR = re.compile(r"\d{4}")


def article_first(title: str) -> str:
    """ "Usual Suspects, The" -> "The Usual Suspects"; "Enfer, L'" -> "L'Enfer"."""
    found = _TRAILING_ARTICLE.match(title)
    if not found:
        return title
    rest, article = found.groups()
    return article + rest if article.endswith("'") else f"{article} {rest}"


def readable_title(title: str, year: str) -> str:
    """The title as people write it, with its year; alternative titles stay in brackets.

    "Seventh Seal, The (Sjunde inseglet, Det)" of 1957 -> "The Seventh Seal (Det Sjunde inseglet)
    (1957)". A year that is no four digits is left out.
    """
    name, alternatives, _ = _ALTERNATIVES.split(title, maxsplit=1)
    readable = article_first(name)
    for alternative in re.findall(r"\(([^()]+)\)", alternatives):
        readable += f" ({article_first(alternative)})"
    return f"{readable} ({year})" if _YEAR.fullmatch(year) else readable


def read_movielens(
    folder: Path,
    max_title_length: int = 0,
    attributes: Sequence[str] = (),
    rating: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Catalogue, Interactions]:
    """What ml-100k.item and ml-100k.inter in a folder hold; raises as `read_interactions` does.

    The attributes are 'year' and 'category', the genres; `rating` names the column of ratings, if
    they are read ({'rating': 'rating'}). Raises UserError for another one.
    """
    for name in attributes:
        check_choice("data.attributes", name, ATTRIBUTES)
    path = folder / ITEMS_FILE
    columns = {"item": "item_id", "title": "movie_title"}
    columns |= {name: ATTRIBUTES[name] for name in ("year", *attributes)}
    table = read_table(path, columns)
    titles = map(readable_title, table.titles("title"), table.texts("year"))
    texts = table.attributes(attributes)
    if "category" in texts:
        texts["category"] = tuple(genres.replace(" ", ", ") for genres in texts["category"])
    catalogue = catalogue_of(path, table.ids("item"), titles, max_title_length, texts)
    columns = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", **rating}
    path = folder / INTERACTIONS_FILE
    return catalogue, read_interactions(path, catalogue, columns)
