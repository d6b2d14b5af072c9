"""CF logits out of stores: .npy files for other programs, and several CF models mixed into one.

The mixture's logit of an item is the sum over models of weight x logit / temperature: a product of
their softmaxes, each at its own temperature. Factorised stores combine into a factorised one, whose
vectors and item tables are the models' own side by side; others combine into a dense one.

Axis letters: E events, I items, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tca4rec_jax.cf.logits_format import (
    LogitsStoreError,
    StorePath,
    block_rows,
    store_path,
    within,
)
from tca4rec_jax.cf.logits_store import LogitsStore, open_store
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences, RecData
from tca4rec_jax.fileio import atomic_path


def export_stores(
    output: str, sources: Sequence[str], data: RecData, splits: Sequence[str], **options
) -> None:
    """Writes output/<split> as the mixture of sources/<split>; options are those of mix_stores.

    Raises LogitsStoreError if a store is missing or does not fit the data.
    """
    for split in splits:
        sequences = data.splits[split]
        stores = [_opened(source, split, data) for source in sources]
        path = within(store_path(output), split)
        mix_stores(path, stores, sequences, data.catalogue, **options)


def export_npy(output: Path, sources: Sequence[str], data: RecData, splits: Sequence[str]) -> None:
    """Writes output/<split>.npy, float32 [E, I], of the one source.

    Raises:
      LogitsStoreError: several sources, or a store that is missing or does not fit.
    """
    if len(sources) != 1:
        raise LogitsStoreError(
            f"a .npy file is made of one store, got {list(sources)}; mix them first"
        )
    for split in splits:
        store = _opened(sources[0], split, data)
        positions = store.positions
        shape = (len(positions), data.catalogue.num_items)
        with atomic_path(output / f"{split}.npy") as temporary:
            logits_ExI = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            step = block_rows(shape)
            for start in range(0, len(positions), step):
                stop = start + step
                logits_ExI[start:stop] = store.logits(positions[start:stop])
            logits_ExI.flush()


def mix_stores(
    path: StorePath,
    stores: Sequence[LogitsStore],
    sequences: ItemSequences,
    catalogue: Catalogue,
    *,
    weights: Sequence[float],
    temperatures: Sequence[float] | None = None,
    dense: bool = False,
    **options,
) -> None:
    """Writes the mixture of open stores of the same rows as a store.

    Args:
      path: the store to write.
      stores: opened for `sequences` and `catalogue`.
      weights: one per store, finite.
      temperatures: one per store, above 0; None for 1 each.
      dense: multiplies factorised stores out, into the logits of all items.
      options: as for `write_store` (dtype, top_k).

    Raises:
      LogitsStoreError: no store, or weights or temperatures that do not fit them.
    """
    temperatures = [1.0] * len(stores) if temperatures is None else temperatures
    if not stores or not len(stores) == len(weights) == len(temperatures):
        raise LogitsStoreError(
            f"{len(stores)} stores need a weight and a temperature each, got weights "
            f"{list(weights)} and temperatures {list(temperatures)}"
        )
    if not (np.isfinite(weights).all() and min(temperatures) > 0):
        raise LogitsStoreError(
            f"weights must be finite and temperatures above 0, got {list(weights)} and "
            f"{list(temperatures)}"
        )
    scales = np.asarray(weights, np.float32) / np.asarray(temperatures, np.float32)
    # One store of last events limits the mixture to them.
    positions = min((store.positions for store in stores), key=len)
    lengths = [store.manifest["history_length"] for store in stores]
    names = [
        f"{weight:g} x {store.manifest['cf_model']} / {temperature:g}"
        for store, weight, temperature in zip(stores, weights, temperatures, strict=True)
    ]
    write_store(
        path,
        sequences,
        catalogue,
        **_mixed_arrays(stores, scales, positions, dense),
        cf_model=" + ".join(names),
        history_length=max((length for length in lengths if length is not None), default=None),
        **options,
    )


def _mixed_arrays(
    stores: Sequence[LogitsStore], scales: np.ndarray, positions: np.ndarray, dense: bool
) -> dict[str, Any]:
    scaled = list(zip(stores, scales, strict=True))
    if dense or any(store.item_table is None for store in stores):

        def logits(start: int, stop: int) -> np.ndarray:
            chosen = positions[start:stop]
            return sum(scale * store.logits(chosen) for store, scale in scaled)

        return {"logits": LazyRows((len(positions), stores[0].manifest["num_items"]), logits)}

    def vectors(start: int, stop: int) -> np.ndarray:
        chosen = positions[start:stop]
        return np.concatenate([scale * store.read(chosen) for store, scale in scaled], axis=1)

    table_IxD = np.concatenate([store.item_table for store in stores], axis=1)
    biases = [scale * store.item_bias for store, scale in scaled if store.item_bias is not None]
    return {
        "vectors": LazyRows((len(positions), table_IxD.shape[1]), vectors),
        "item_table": table_IxD,
        "item_bias": sum(biases) if biases else None,
    }


def _opened(source: str, split: str, data: RecData) -> LogitsStore:
    return open_store(within(store_path(source), split), data.splits[split], data.catalogue)
