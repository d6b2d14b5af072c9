"""A vector for every item in a file: of launch/embed_items.py, or of the user's own making.

Layout of what launch/embed_items.py writes below a work directory:
  item_embeddings/embeddings.npy   float32 [I, D], the items in the catalogue's order
  item_embeddings/provenance.json  what they were made from
  item_embeddings/parts/           what an interrupted call has made so far
"""

from pathlib import Path

import numpy as np

from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.provenance import FILE, Provenance

EMBED_ITEMS = "launch/embed_items.py"
VECTORS, PARTS = "embeddings.npy", "parts"
EMBEDDINGS = "item embeddings"
"""The input of what is made of a work directory's item embeddings, see embeddings_fingerprint."""


def embeddings_folder(workdir: Path) -> Path:
    """Where launch/embed_items.py writes."""
    return workdir / "item_embeddings"


def embeddings_fingerprint(workdir: Path) -> str:
    """Of what a work directory's item embeddings were made from; '' if they do not say."""
    folder = embeddings_folder(workdir)
    return Provenance.load(folder).fingerprint if (folder / FILE).is_file() else ""


def vectors_path(file: str | None, workdir: Path) -> Path:
    """The file of a field that names one, by default the work directory's item embeddings."""
    return Path(file) if file else embeddings_folder(workdir) / VECTORS


def read_item_vectors(path: Path, catalogue: Catalogue) -> np.ndarray:
    """The vectors of a .npy file, float32 [I, D]; of launch/embed_items.py or anyone else.

    Raises UserError for a file that is missing, unreadable, an .npz archive, no matrix of numbers,
    of another number of items or with a number that is not finite, naming the item; StaleError for
    item embeddings (those with a provenance.json beside them) of another catalogue.
    """
    vectors_IxD = _opened(path)
    if (path.parent / FILE).is_file():
        Provenance.load(path.parent).check({"catalogue": catalogue.content_hash()}, path)
    if len(vectors_IxD) != catalogue.num_items:
        raise UserError(
            f"{path} has vectors of {len(vectors_IxD)} items, the catalogue {catalogue.num_items}:"
            " expected one for each item, in the catalogue's order"
        )
    vectors_IxD = vectors_IxD.astype(np.float32)
    broken_I = ~np.isfinite(vectors_IxD).all(axis=1)
    if broken_I.any():
        item = int(np.argmax(broken_I))
        raise UserError(
            f"{path}: the vector of item {catalogue.item_ids[item]!r} (row {item}) is not finite"
        )
    return vectors_IxD


def vectors_width(path: Path) -> int:
    """D of a file of item vectors, of which only the header is read. Raises as its reader."""
    return _opened(path).shape[1]


def vectors_content(path: Path) -> str:
    """SHA-256 (hex) of a file of item vectors. Raises UserError if it is missing."""
    _check_there(path)
    return file_sha256(path)


def _opened(path: Path) -> np.ndarray:
    """The matrix of a .npy file, not read yet."""
    _check_there(path)
    with reading(path, ".npy file"):
        vectors_IxD = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(vectors_IxD, np.ndarray):  # an archive, which stays open
        vectors_IxD.close()
        raise UserError(f"{path} is an .npz archive: expected one array of np.save")
    if vectors_IxD.ndim != 2 or vectors_IxD.dtype.kind != "f" or not vectors_IxD.size:
        found = f"{vectors_IxD.dtype} of shape {vectors_IxD.shape}"
        raise UserError(f"{path} is {found}: expected floating point [items, width]")
    return vectors_IxD


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file of item vectors; {EMBED_ITEMS} makes embeddings")
