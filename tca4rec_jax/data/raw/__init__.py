"""The files that people download, as they come: `FORMATS` by data.source, `read_raw`."""

from tca4rec_jax.data.raw.formats import FORMATS
from tca4rec_jax.data.raw.reading import ItemTexts, read_raw

__all__ = ["FORMATS", "ItemTexts", "read_raw"]
