"""CF logits out of stores: .npy and Parquet files for others, and several CF models in a mixture.

The mixture's logit of an item is the sum over models of weight x logit / temperature: a product of
their softmaxes, each at its own temperature. Factorised stores combine into a factorised one, whose
vectors and item tables are the models' own side by side; others combine into a dense one.

Axis letters: E events.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from tca4rec_jax.cf.logits_format import (
    EXPORT,
    LogitsStoreError,
    Origin,
    blocks,
    store_path,
    within,
)
from tca4rec_jax.cf.logits_store import LogitsStore, open_store
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.scoring import LazyRows
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.fileio import atomic_path, check_room


def export_stores(
    output: str,
    sources: Sequence[str],
    data: RecData,
    splits: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    temperatures: Sequence[float] | None = None,
    dense: bool = False,
    **options,
) -> None:
    """Writes output/<split> as the mixture of the stores sources/<split>.

    Every source has a finite weight and a temperature above 0, by default 1. `dense` multiplies
    factorised stores out, into the logits of all items. `options` are those of `write_store`
    (dtype, top_k).

    Raises LogitsStoreError if a store is missing or does not fit the data, or if weights or
    temperatures do not fit the sources.
    """
    ones = [1.0] * len(sources)
    weights, temperatures = weights or ones, temperatures or ones
    given = f"got weights {weights} and temperatures {temperatures}"
    if not sources or not len(sources) == len(weights) == len(temperatures):
        raise LogitsStoreError(
            f"{len(sources)} stores need a weight and a temperature each, {given}"
        )
    if not (np.isfinite(weights).all() and min(temperatures) > 0):
        raise LogitsStoreError(f"weights must be finite and temperatures above 0, {given}")
    scales = np.asarray(weights, np.float32) / np.asarray(temperatures, np.float32)
    for split in splits:
        stores = [_opened(source, split, data) for source in sources]
        write_store(
            within(store_path(output), split),
            data.splits[split],
            data.catalogue,
            _mixed_origin([store.manifest for store in stores], weights, temperatures),
            **_mixed_arrays(stores, scales, dense),
            **options,
        )


def export_npy(output: Path, sources: Sequence[str], data: RecData, splits: Sequence[str]) -> None:
    """Writes output/<split>.npy, float32 [E, I], of the one source.

    Raises LogitsStoreError for several sources, or a store that is missing or does not fit,
    UserError before anything is written if the disk lacks room, OSError if it is full after all.
    """
    rows_of = _logits_of_one(sources, data, splits)
    num_bytes = 4 * sum(math.prod(rows.shape) for rows in rows_of.values())
    check_room(output, num_bytes, "float32 logits")
    for split, rows in rows_of.items():
        # Not through a memory map: on a disk that is full after all it ends the process.
        with atomic_path(output / f"{split}.npy") as temporary, temporary.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": rows.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _, block in blocks(rows):
                file.write(np.ascontiguousarray(block, "<f4").data)


def export_parquet(
    output: Path,
    sources: Sequence[str],
    data: RecData,
    splits: Sequence[str],
    top_k: int | None = None,
) -> None:
    """Writes output/<split>.parquet of the one source: an event's items, best first.

    Columns: user (id), position (flat, or row if the store has last events alone), item (id) and
    score (float32), as `import_logits` takes them back. `top_k` of an event; default: all items.
    Raises as `export_npy`.
    """
    rows_of, catalogue = _logits_of_one(sources, data, splits), data.catalogue
    count = min(top_k or catalogue.num_items, catalogue.num_items)
    num_bytes = 8 * count * sum(len(rows) for rows in rows_of.values())
    check_room(output, num_bytes, "logits")
    items_I = pa.array(catalogue.item_ids, pa.string())
    for split, rows in rows_of.items():
        sequences = data.splits[split]
        is_whole = len(rows) == len(sequences.items)
        user_E = np.repeat(sequences.user, sequences.lengths if is_whole else 1)
        users_E = np.array(data.user_ids)[user_E] if data.user_ids else user_E.astype(str)
        columns = ("user", "position" if is_whole else "row", "item", "score")
        kinds = pa.string(), pa.int64(), pa.dictionary(pa.int32(), pa.string()), pa.float32()
        schema = pa.schema(zip(columns, kinds, strict=True))
        with (
            atomic_path(output / f"{split}.parquet") as temporary,
            pa.parquet.ParquetWriter(temporary, schema) as writer,
        ):
            for start, block_mxI in blocks(rows):
                event_m = np.repeat(np.arange(start, start + len(block_mxI)), count)
                best_mxK = np.argsort(-block_mxI, axis=1, kind="stable")[:, :count]
                items = pa.DictionaryArray.from_arrays(best_mxK.ravel().astype(np.int32), items_I)
                score_mxK = np.take_along_axis(block_mxI, best_mxK, axis=1)
                arrays = [users_E[event_m], event_m, items, score_mxK.ravel()]
                writer.write_table(pa.table(dict(zip(columns, arrays, strict=True)), schema))


def _logits_of_one(
    sources: Sequence[str], data: RecData, splits: Sequence[str]
) -> dict[str, LazyRows]:
    """The logits [E, I] of the splits of the one source, of its events."""
    if len(sources) != 1:
        raise LogitsStoreError(f"a file is made of one store, got {sources}; mix them first")
    stores = {split: _opened(sources[0], split, data) for split in splits}
    return {
        split: LazyRows(store.logits, store.positions, data.catalogue.num_items)
        for split, store in stores.items()
    }


def _mixed_origin(
    manifests: Sequence[dict], weights: Sequence[float], temperatures: Sequence[float]
) -> Origin:
    def mixed(field: str) -> str:
        mixture = zip(manifests, weights, temperatures, strict=True)
        return " + ".join(
            f"{weight:g} x {manifest[field]} / {temperature:g}"
            for manifest, weight, temperature in mixture
        )

    lengths = [manifest["history_length"] for manifest in manifests]
    return Origin(
        mixed("cf_model"),
        model=mixed("model"),
        history_length=max((length for length in lengths if length is not None), default=None),
        made_by=EXPORT,
        inputs={"values": [manifest["content_hash"] for manifest in manifests]},
    )


def _mixed_arrays(stores: Sequence[LogitsStore], scales: np.ndarray, dense: bool) -> dict[str, Any]:
    scaled = list(zip(stores, scales, strict=True))
    # One store of last events limits the mixture to them.
    positions = min((store.positions for store in stores), key=len)
    if dense or any(store.item_table is None for store in stores):

        def logits(position_m: np.ndarray) -> np.ndarray:
            return sum(scale * store.logits(position_m) for store, scale in scaled)

        return {"logits": LazyRows(logits, positions, stores[0].manifest["num_items"])}

    def vectors(position_m: np.ndarray) -> np.ndarray:
        return np.concatenate([scale * store.read(position_m) for store, scale in scaled], axis=1)

    table_IxD = np.concatenate([store.item_table for store in stores], axis=1)
    biases = [scale * store.item_bias for store, scale in scaled if store.item_bias is not None]
    return {
        "vectors": LazyRows(vectors, positions, table_IxD.shape[1]),
        "item_table": table_IxD,
        "item_bias": sum(biases) if biases else None,
    }


def _opened(source: str, split: str, data: RecData) -> LogitsStore:
    return open_store(within(store_path(source), split), data.splits[split], data.catalogue)
