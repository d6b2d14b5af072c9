"""Several CF models as one: stores combined by weights, with a temperature for each.

The mixture's logit of an item is the sum over models of weight x logit / temperature: a product of
their softmaxes, each at its own temperature. Factorised stores combine into a factorised one, whose
vectors and item tables are the models' own side by side; others combine into a dense one.

Axis letters: m entries read, I items, D width.
"""

from collections.abc import Sequence

import numpy as np

from tca4rec_jax.cf.logits_arrays import LogitsStoreError, Place
from tca4rec_jax.cf.logits_store import LogitsStore
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import ItemSequences


def mix_stores(
    path: Place,
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
    per_row = any(store.manifest["entries_per"] == "row" for store in stores)
    positions = sequences.last_positions if per_row else np.arange(len(sequences.items))
    lengths = [store.manifest["history_length"] for store in stores]
    known = [length for length in lengths if length is not None]
    names = [
        f"{weight:g} x {store.manifest['cf_model']} / {temperature:g}"
        for store, weight, temperature in zip(stores, weights, temperatures, strict=True)
    ]
    write_store(
        path,
        sequences,
        catalogue,
        **_arrays(stores, scales, positions, catalogue.num_items, dense),
        cf_model=" + ".join(names),
        history_length=max(known, default=None),
        **options,
    )


def _arrays(stores, scales, positions, num_items: int, dense: bool) -> dict:
    scaled = list(zip(stores, scales, strict=True))
    if dense or any(store.item_table is None for store in stores):

        def logits(start, stop):
            chosen = positions[start:stop]
            return sum(scale * store.logits(chosen) for store, scale in scaled)

        return {"logits": LazyRows((len(positions), num_items), logits)}

    def vectors(start, stop):
        chosen = positions[start:stop]
        return np.concatenate([scale * store.read(chosen) for store, scale in scaled], axis=1)

    table_IxD = np.concatenate([store.item_table for store in stores], axis=1)
    biases = [scale * store.item_bias for store, scale in scaled if store.item_bias is not None]
    return {
        "vectors": LazyRows((len(positions), table_IxD.shape[1]), vectors),
        "item_table": table_IxD,
        "item_bias": sum(biases) if biases else None,
    }
