"""CF logits out of stores: other stores, or .npy files for other programs.

Axis letters: E entries, I items.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tca4rec_jax.cf.logits_arrays import block_rows, place_of, within
from tca4rec_jax.cf.logits_store import LogitsStore, open_store
from tca4rec_jax.cf.mixture import mix_stores
from tca4rec_jax.data.sequences import ItemSequences, RecData


def export_stores(
    output: str, sources: Sequence[str], data: RecData, splits: Sequence[str], **options
) -> None:
    """Writes output/<split> as the mixture of sources/<split>; options are those of mix_stores.

    Raises LogitsStoreError if a store is missing or does not fit the data.
    """
    for split in splits:
        sequences = data.splits[split]
        stores = [_opened(source, split, data) for source in sources]
        place = within(place_of(output), split)
        mix_stores(place, stores, sequences, data.catalogue, **options)


def export_npy(output: Path, sources: Sequence[str], data: RecData, splits: Sequence[str]) -> None:
    """Writes output/<split>.npy, float32 [entries, items], of the one source.

    Raises LogitsStoreError if a store is missing or does not fit; ValueError for several sources.
    """
    if len(sources) != 1:
        raise ValueError(f"a .npy file is made of one store, got {list(sources)}; mix them first")
    output.mkdir(parents=True, exist_ok=True)
    for split in splits:
        store = _opened(sources[0], split, data)
        positions = entry_positions(store, data.splits[split])
        beside = output / f".{split}.npy.partial"
        shape = (len(positions), data.catalogue.num_items)
        logits_ExI = np.lib.format.open_memmap(beside, "w+", np.float32, shape)
        step = block_rows(shape)
        for start in range(0, len(positions), step):
            logits_ExI[start : start + step] = store.logits(positions[start : start + step])
        logits_ExI.flush()
        os.replace(beside, output / f"{split}.npy")


def entry_positions(store: LogitsStore, sequences: ItemSequences) -> np.ndarray:
    """The flat position of every entry of a store, in the store's order."""
    per_row = store.manifest["entries_per"] == "row"
    return sequences.last_positions if per_row else np.arange(len(sequences.items))


def _opened(source: str, split: str, data: RecData) -> LogitsStore:
    return open_store(within(place_of(source), split), data.splits[split], data.catalogue)
