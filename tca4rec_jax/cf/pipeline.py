"""From prepared data to CF logits: trains the CF model, ranks, writes the logits of every split.

Layout written below a work directory:
  cf/checkpoint.npz      the trained model
  cf/training.npz        the state of its training, to go on from
  cf/logits/<split>/     one logits store per split: an event per flat position of the users'
                         sequences, the last event of each row (its target) of the other splits; or
                         below config.cf.logits, a folder or a bucket
  cf/metrics.json        written last: it stands for a complete run
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from tca4rec_jax.cf.checkpoint import save_model
from tca4rec_jax.cf.item_tables import freeze_tables, start_tables
from tca4rec_jax.cf.logits_format import TRAIN_CF, LogitsStoreError, Origin
from tca4rec_jax.cf.logits_store import open_store, split_path
from tca4rec_jax.cf.logits_writer import MANY_ITEMS, made_by, write_store
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec
from tca4rec_jax.cf.scoring import host_items, profile, score_targets, user_vectors
from tca4rec_jax.cf.settings import CFSettings, item_inputs, model_inputs
from tca4rec_jax.cf.soft_labels import label_logits
from tca4rec_jax.cf.trainer import fit
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_vectors import read_item_vectors, vectors_path
from tca4rec_jax.data.sequences import SPLITS, TRAINING_SPLITS, ItemSequences, RecData
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import fingerprint, write_text
from tca4rec_jax.lease import only_writer
from tca4rec_jax.metrics import CUTOFFS, mean_metrics
from tca4rec_jax.provenance import Provenance

REPORTED = (*CUTOFFS, 20)


def run_cf(config: Mapping, data: RecData, workdir: Path, *, history_length: int) -> dict:
    """Trains and stores, or finds a complete run of the same config and data.

    `config` is `config.cf` (settings.py). Returns the contents of metrics.json: 'results' is
    {model: what evaluate_model gives}, 'profiles' {model: what scoring.profile gives for the test
    rows}. Raises UserError for values out of range, a `history_length` beyond the model's, places
    of stores that hold something else, such as imported logits, and another process that trains.
    """
    settings = CFSettings.of(config, data)
    available = settings.architecture.history_length  # None: of any length
    if available is not None and not 1 <= history_length <= available:
        raise UserError(
            f"the history is {history_length} items long, but the CF model reads 1 to {available}; "
            "train the CF model with a longer history_length or shorten the history"
        )
    directory = Path(workdir) / "cf"
    made_from = made_from_of(config, data, workdir)
    origin = _origin(settings, made_from)
    identity = fingerprint([origin.inputs, settings.fields.filter_seen])
    _check_places(settings, workdir)
    with only_writer(directory):
        if (found := _complete_run(directory, settings, identity, origin, data)) is not None:
            logging.info("CF: %s holds a complete run of this config and data", directory)
            return found
        (directory / "metrics.json").unlink(missing_ok=True)
        metrics = {"identity": identity} | _run(settings, made_from, origin, data, workdir)
        write_text(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        (directory / "training.npz").unlink(missing_ok=True)
    return metrics


def _run(
    settings: CFSettings, made_from: Provenance, origin: Origin, data: RecData, workdir: Path
) -> dict:
    """Trains and stores; returns the rest of metrics.json."""
    directory, began = Path(workdir) / "cf", time.perf_counter()
    model, training = trained_model(settings, data, directory)
    save_model(directory / "checkpoint.npz", settings.fields.model, model, made_from)
    store_logits(settings, model, origin, data, workdir)
    train = data.splits["train_sequences"]
    baseline = CFSettings.of({"model": "popularity"}, data)
    models = {baseline.kind.label: _fresh(baseline, train), settings.kind.label: model}
    count_I = np.bincount(train.items, minlength=data.catalogue.num_items)
    results = {
        label: evaluate_model(model, data, settings.fields.filter_seen)
        for label, model in models.items()
    }
    _warn_of_a_weak_model(results, baseline.kind.label, settings.kind.label)
    return {
        "filter_seen": settings.fields.filter_seen,
        "results": results,
        "profiles": {
            label: profile(model, data.splits["test"], count_I) for label, model in models.items()
        },
        "training": training,
        "seconds": time.perf_counter() - began,
    }


def trained_model(settings: CFSettings, data: RecData, directory: Path) -> tuple[CFModel, dict]:
    """The model of the settings, trained (or read), and the record of its training."""
    config = settings.training
    if weights := settings.fields.weights:
        return read_sasrec(weights, settings.architecture), {"weights": weights}
    if config is None:
        return _fresh(settings, data.splits["train_sequences"]), {}
    if config.loss == "softmax" and data.catalogue.num_items > MANY_ITEMS:
        logging.warning(
            "CF: the loss 'softmax' makes logits of all %d items for every target; "
            "'sampled_softmax' with negatives=4096, in cf.%s, draws some",
            *(data.catalogue.num_items, settings.fields.model),
        )
    train = data.splits["train" if config.targets == "last" else "train_sequences"]
    fresh, checkpoint = _fresh(settings, train), directory / "training.npz"
    items = _take_vectors(fresh, settings, data.catalogue, directory.parent)
    rows = train, data.splits["validation"]
    fitted = fit(fresh, *rows, config, checkpoint=checkpoint, made_from=items)
    return fitted.model, {"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}


def _take_vectors(
    model: CFModel, settings: CFSettings, catalogue: Catalogue, workdir: Path
) -> dict[str, Any]:
    """Makes the item tables of a fresh model of item vectors, if it should; what of (inputs)."""
    fields, seed = settings.fields, settings.training.seed if settings.training else 0
    if fields.takes_vectors:
        path = vectors_path(fields.item_vectors, workdir)
        vectors_IxE = read_item_vectors(path, catalogue)
        if fields.item_init:
            start_tables(model, vectors_IxE, fields.item_init, seed)
        else:
            freeze_tables(model, vectors_IxE, fields.item_adapter, seed)
    return item_inputs(fields, workdir)


def made_from_of(config: Mapping, data: RecData, workdir: Path) -> Provenance:
    """What a model of `config.cf` is made from; its fingerprint is the `model` of its stores."""
    inputs = {
        "cf": model_inputs(config, workdir),
        "catalogue": data.catalogue.content_hash(),
        "rows": {split: sequences.content_hash() for split, sequences in data.splits.items()},
    }
    return Provenance("CF model", TRAIN_CF, inputs)


def _origin(settings: CFSettings, made_from: Provenance) -> Origin:
    fields = settings.fields
    return Origin(
        settings.kind.label,
        model=made_from.fingerprint,
        history_length=settings.architecture.history_length,
        made_by=TRAIN_CF,
        inputs={
            **made_from.inputs,
            "cf.dtype": fields.dtype,
            "cf.top_k": fields.top_k,
            # Not where it is not used: stores of before have none.
            **({"cf.label_items": fields.label_items} if fields.label_items else {}),
        },
    )


def store_logits(
    settings: CFSettings, model: CFModel, origin: Origin, data: RecData, workdir: Path
) -> None:
    """Writes the logits of every split to its store."""
    fields, items = settings.fields, host_items(model)
    for split, sequences in data.splits.items():
        positions = None if split == "train_sequences" else sequences.last_positions
        rows, top_k = user_vectors(model, sequences, positions), fields.top_k
        arrays: dict[str, Any] = {"logits": rows}
        if items.table_IxD is not None:
            arrays = {"vectors": rows, "item_table": items.table_IxD, "item_bias": items.bias_I}
        if split in TRAINING_SPLITS and (count := fields.label_items):
            arrays, top_k = {"logits": label_logits(rows, items, sequences, count)}, count
        write_store(
            split_path(fields.logits, workdir, split),
            sequences,
            data.catalogue,
            origin,
            **arrays,
            dtype=fields.dtype,
            top_k=top_k,
        )


def evaluate_model(model: CFModel, data: RecData, filter_seen: bool) -> dict[str, dict]:
    """Full rankings: {subset: {'hr@K', 'ndcg@K', 'nll', 'entropy', 'rows'}}.

    Subsets are validation, test, 'test, tied' and 'test, untied': its rows by `tied`.
    """
    results = {}
    for split in ("validation", "test"):
        rows, seen_RxS = data.splits[split], None
        if filter_seen:
            seen_RxS, _ = rows.histories_and_targets(max(int(rows.lengths.max()) - 1, 1))
        scores = score_targets(model, rows, seen_RxS)
        subsets = {split: np.ones(len(rows), bool)}
        if split == "test" and rows.tied.any():
            # Among tied interactions the order is arbitrary, so they are also reported apart.
            subsets |= {"test, tied": rows.tied, "test, untied": ~rows.tied}
        for name, chosen_R in subsets.items():
            if count := int(chosen_R.sum()):
                results[name] = mean_metrics(scores.rank[chosen_R], REPORTED)
                for field in ("nll", "entropy"):
                    results[name][field] = float(getattr(scores, field)[chosen_R].mean())
                results[name]["rows"] = count
    return results


def _warn_of_a_weak_model(results: Mapping[str, dict], baseline: str, label: str) -> None:
    popular, own = (results[name]["validation"]["hr@10"] for name in (baseline, label))
    if own < popular:
        logging.warning(
            "CF: %s has an HR@10 of %.4f on the validation rows, %r has %.4f: it was trained too "
            "little, or read (cf.weights) with another catalogue or other settings, such as "
            "cf.sasrec.norm",
            *(label, own, baseline, popular),
        )


def _fresh(settings: CFSettings, train: ItemSequences) -> CFModel:
    """A model that has yet to be trained, except for its statistics of the training data."""
    seed = settings.training.seed if settings.training else 0
    model = settings.kind.module(settings.architecture, rngs=nnx.Rngs(seed))
    model.fit_statistics(train)
    return model


def _check_places(settings: CFSettings, workdir: Path) -> None:
    """Raises UserError if a split's store would replace what this script has not written."""
    for split in SPLITS:
        path = split_path(settings.fields.logits, workdir, split)
        if (script := made_by(path)) not in (None, TRAIN_CF):
            raise LogitsStoreError(
                f"{path} was written by {script or 'an earlier version'} and is not replaced: give "
                "this CF model another folder with --config.cf.logits=, or delete that one"
            )


def _complete_run(
    directory: Path, settings: CFSettings, identity: str, origin: Origin, data: RecData
) -> dict | None:
    """The metrics of a complete run, or None: there is none, or one of its stores is damaged."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        if metrics["identity"] != identity:
            return None
        for split, sequences in data.splits.items():
            path = split_path(settings.fields.logits, directory.parent, split)
            store = open_store(path, sequences, data.catalogue)
            if store.manifest["model"] != origin.model:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics
