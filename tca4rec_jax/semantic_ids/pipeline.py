"""From item embeddings to WORKDIR/ids: the ids, and the report on them.

Layout written below a work directory:
  ids/ids.json                what prompts show as {id}; written after the two files that follow
  ids/provenance.json         what the ids were made from
  ids/making.json             what the report says of their making
  ids/report.json, .md, .png  see report.py; report.json has a provenance of its own
  ids_of_others/report.*      the report on the ids of ids.path
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tca4rec_jax.cf.logits_store import LogitsStore, is_store, open_store, split_path
from tca4rec_jax.cf.settings import store_inputs
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_vectors import (
    EMBEDDINGS,
    embeddings_fingerprint,
    read_item_vectors,
    vectors_content,
    vectors_path,
)
from tca4rec_jax.data.sequences import ItemSequences, RecData
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import file_sha256, read_json
from tca4rec_jax.lease import only_writer
from tca4rec_jax.provenance import FILE, Provenance
from tca4rec_jax.reporting import write_results
from tca4rec_jax.semantic_ids.collisions import ids_of_codes, make_unique
from tca4rec_jax.semantic_ids.ids import SemanticIds, catalogue_ids, ids_path, write_ids
from tca4rec_jax.semantic_ids.k_means import Quantised, residual_k_means
from tca4rec_jax.semantic_ids.report import REPORT, CFRows, describe, write_report
from tca4rec_jax.semantic_ids.rq_vae import RQVAEConfig, fit_rq_vae
from tca4rec_jax.semantic_ids.settings import Quantiser

MAKE_IDS = "launch/make_ids.py"
OF_OTHERS = "ids_of_others"
_MAKING = "making.json"
_REMEDY = f"delete it and run {MAKE_IDS} again"
_SPLIT, _USERS = "test", 1000  # whose CF logits the report describes, at most


def make_ids(
    data: RecData,
    workdir: Path,
    quantiser: Quantiser,
    rq_vae: RQVAEConfig,
    *,
    path: str | None,
    cf: Mapping,
    beta: float,
) -> dict[str, Any]:
    """Makes the ids of the catalogue and the report, or finds those of the same inputs.

    Args:
      data: the prepared data.
      workdir: where ids/ or ids_of_others/ is written; it may hold item embeddings and CF logits.
      quantiser, rq_vae: how.
      path: a JSON file of ids, to report on these instead of making any.
      cf: config.cf. Without CF logits the report leaves out what it says of them.
      beta: the temperature of the CF logits.

    Returns the report. Raises UserError, before any work, for item vectors as `read_item_vectors`,
    ids as `catalogue_ids`, CF logits as `open_store`, a cf_weight without factorised CF logits, and
    another process that writes; FloatingPointError as `fit_rq_vae`.
    """
    store = _cf_store(data, workdir, cf)
    cf_IxC = None if store is None else store.item_table
    if path is None and quantiser.method == "rq_vae" and rq_vae.cf_weight and cf_IxC is None:
        raise UserError(
            f"ids.rq_vae.cf_weight is {rq_vae.cf_weight:g}: it needs the item vectors of "
            "factorised CF logits, which launch/train_cf.py writes for most models; give 0"
        )
    catalogue = data.catalogue
    if path is not None:
        folder, theirs = workdir / OF_OTHERS, Path(path)
        if not theirs.is_file():
            raise UserError(f"ids.path: {path} does not exist")
        with only_writer(folder):
            return _report(folder, theirs, catalogue, store, beta, {"path": path})
    ours = ids_path(None, workdir)
    made_from = Provenance(
        "semantic ids",
        MAKE_IDS,
        {"catalogue": catalogue.content_hash(), **_made_from(quantiser, rq_vae, workdir, store)},
    )
    with only_writer(ours.parent):
        if _is_complete(ours, made_from):
            logging.info("Ids: %s holds those of this config and these inputs", ours)
        else:
            ids, making = _make(catalogue, workdir, quantiser, rq_vae, cf_IxC)
            for old in (ours, ours.parent / REPORT):  # ids are never beside what is not theirs
                old.unlink(missing_ok=True)
            write_results(ours.parent / _MAKING, making)
            made_from.save(ours.parent)
            write_ids(ours, ids, catalogue.item_ids)
        making = read_json(ours.parent / _MAKING, remedy=_REMEDY)
        return _report(ours.parent, ours, catalogue, store, beta, making)


def _report(
    folder: Path,
    path: Path,
    catalogue: Catalogue,
    store: LogitsStore | None,
    beta: float,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Writes the report on a file of ids, or finds that of the same inputs; `about` is added."""
    inputs = {
        "ids": str(path),
        "SHA-256 of ids": file_sha256(path),
        "catalogue": catalogue.content_hash(),
        "cf_logits": store and store.manifest["content_hash"],
        "objective.beta": beta,
    }
    made_from, file = Provenance("report on semantic ids", MAKE_IDS, inputs), folder / REPORT
    found = read_json(file, remedy=_REMEDY) if file.is_file() else {}
    if found.get("provenance", {}).get("inputs") == made_from.inputs:
        return found
    ids = catalogue_ids(path, catalogue)
    report = describe(ids, None if store is None else _cf_rows(store, beta))
    for values, left in zip(report["levels"].values(), about.pop("left", ()), strict=False):
        values["left"] = left
    report |= about | {"provenance": dataclasses.asdict(made_from)}
    write_report(folder, report, ids)
    return report


def _make(
    catalogue: Catalogue,
    workdir: Path,
    quantiser: Quantiser,
    rq_vae: RQVAEConfig,
    cf_IxC: np.ndarray | None,
) -> tuple[SemanticIds, dict[str, Any]]:
    """The ids, and what the report says of their making."""
    vectors = vectors_path(quantiser.item_vectors, workdir)
    embedding_IxE, began = read_item_vectors(vectors, catalogue), time.perf_counter()
    quantised = quantise_items(embedding_IxE, quantiser, rq_vae, cf_IxC)
    codes, sharing = make_unique(quantised, quantiser.collisions)
    seconds = time.perf_counter() - began
    _, count = np.unique(embedding_IxE, axis=0, return_counts=True)
    if quantiser.collisions == "none" and sharing["quantiser"]:
        logging.warning("Ids: %d items share theirs with another one", sharing["quantiser"])
    return ids_of_codes(codes, catalogue.item_ids), {
        "left": quantised.left,
        "items with the embedding of another one": int(count[count > 1].sum()),
        "sharing": sharing,
        "seconds": seconds,
    }


def quantise_items(
    embedding_IxE: np.ndarray,
    quantiser: Quantiser,
    rq_vae: RQVAEConfig,
    cf_IxC: np.ndarray | None = None,
) -> Quantised:
    """The codes of item embeddings, float32 [I, E]; `cf_IxC` are the CF model's item vectors."""
    if quantiser.method == "rq_vae":
        cf_IxC = cf_IxC if rq_vae.cf_weight else None
        seed = quantiser.seed
        return fit_rq_vae(embedding_IxE, quantiser.codes, rq_vae, seed=seed, cf_IxC=cf_IxC)
    balanced = quantiser.method == "balanced_rq_k_means"
    return residual_k_means(embedding_IxE, quantiser.codes, balanced=balanced, seed=quantiser.seed)


def _made_from(
    quantiser: Quantiser, rq_vae: RQVAEConfig, workdir: Path, store: LogitsStore | None
) -> dict[str, Any]:
    fields = dataclasses.asdict(quantiser)
    path = vectors_path(fields.pop("item_vectors"), workdir)
    used = dataclasses.asdict(rq_vae) if quantiser.method == "rq_vae" else {}
    inputs = {"item_vectors": vectors_content(path), "ids": fields, "ids.rq_vae": used}
    if path == vectors_path(None, workdir):
        inputs[EMBEDDINGS] = embeddings_fingerprint(workdir)
    if store is not None and used.get("cf_weight"):
        inputs["cf_logits"] = store.manifest["content_hash"]
    return inputs


def _is_complete(path: Path, made_from: Provenance) -> bool:
    files = path, path.parent / _MAKING, path.parent / FILE
    if not all(file.is_file() for file in files):
        return False
    return Provenance.load(path.parent).inputs == made_from.inputs


def _cf_store(data: RecData, workdir: Path, cf: Mapping) -> LogitsStore | None:
    """The CF logits of the split that the report describes, if there are any."""
    path = split_path(cf["logits"], workdir, _SPLIT)
    if not is_store(path):
        logging.info("Ids: there are no CF logits in %s, so the report says nothing of them", path)
        return None
    rows = data.splits[_SPLIT]
    made_from = store_inputs(cf, workdir)
    return open_store(path, rows, data.catalogue, positions=_positions(rows), cf=made_from)


def _positions(rows: ItemSequences) -> np.ndarray:
    """The last events of at most _USERS rows: int64."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:_USERS]
    return rows.last_positions[np.sort(chosen)]


def _cf_rows(store: LogitsStore, beta: float) -> CFRows:
    return CFRows(store.read(_positions(store.sequences)), store.cf_items, beta)
