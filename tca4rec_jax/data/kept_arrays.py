"""Arrays that are made once and then memory-mapped: titles as tokens, the trie.

Layout below a work directory, for large catalogues alone (experiment_inputs.py):
  kept/<name>_<key>/       .npy files and provenance.json; the key is of what they were made from
It may be deleted: what is missing is made anew.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import atomic_path, remove
from tca4rec_jax.provenance import FILE, Provenance

_KEY = 16  # hex digits


def kept_arrays(
    folder: Path,
    name: str,
    made_from: Provenance,
    names: Sequence[str],
    make: Callable[[], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The arrays of these names: memory-mapped (read-only) where they are kept, else made and kept.

    What is damaged is made anew. Where nothing can be written they stay in memory.
    """
    path = folder / f"{name}_{made_from.fingerprint[:_KEY]}"
    if path.is_dir():
        try:
            return _opened(path, made_from, names)
        except (OSError, ValueError) as error:
            logging.warning("%s is damaged (%s): it is made anew", path, error)
            remove(path)
    arrays = dict(make())
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            for one, array in arrays.items():
                np.save(temporary / f"{one}.npy", array)
            made_from.save(temporary)
        return _opened(path, made_from, names)
    except (OSError, ValueError) as error:  # a folder of others, a full disk, another process
        logging.info("%s is not kept (%s)", path, error)
        return arrays


def _opened(path: Path, made_from: Provenance, names: Sequence[str]) -> dict[str, np.ndarray]:
    if Provenance.load(path).inputs != made_from.inputs:
        raise UserError(f"{FILE} is of other inputs")
    files = {name: path / f"{name}.npy" for name in names}
    return {name: np.asarray(np.load(file, mmap_mode="r")) for name, file in files.items()}
