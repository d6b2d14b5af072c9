"""From prepared data to CF logits: trains the CF model, ranks, writes the logits of every split.

Layout written below a work directory:
  cf/checkpoint.npz      the trained model
  cf/training.npz        the state of its training, to go on from
  cf/logits/<split>/     one logits store per split: an event per flat position of the users'
                         sequences, the last event of each row (its target) of the other splits; or
                         below config.cf.logits, a folder or a bucket
  cf/metrics.json        written last: it stands for a complete run
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import nnx
from rich.table import Table

from tca4rec_jax.cf.checkpoint import save_model
from tca4rec_jax.cf.logits_store import open_store, split_path
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.registry import MODELS, ModelKind
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec
from tca4rec_jax.cf.scoring import (
    RowScores,
    check_history_length,
    host_items,
    profile,
    score_targets,
    user_vectors,
)
from tca4rec_jax.cf.settings import CFSettings, architecture_of
from tca4rec_jax.cf.trainer import fit
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.fileio import file_sha256, fingerprint, write_text
from tca4rec_jax.metrics import CUTOFFS, mean_metrics
from tca4rec_jax.reporting import console_table

BASELINE = MODELS["popularity"]
EVALUATED = ("validation", "test")
REPORTED = (*CUTOFFS, 20)


def run_cf(config: Mapping, data: RecData, workdir: Path, *, history_length: int) -> dict:
    """Trains and stores, or finds a complete run of the same config and data.

    Args:
      config: `config.cf`, see settings.py.
      data: the prepared data.
      workdir: results go below workdir/cf.
      history_length: of the data's rows; the CF model must be able to read as much.

    Returns:
      The contents of metrics.json: 'results' is {model: {subset: {'hr@K', 'ndcg@K', 'nll',
      'entropy', 'rows'}}}; subsets are validation, test, 'test, tied' and 'test, untied';
      'profiles' is {model: what scoring.profile gives for the test rows}.

    Raises:
      UserError: values out of range, a history longer than the model's.
    """
    settings = CFSettings.of(config, data)
    check_history_length(history_length, settings.architecture.history_length)
    directory = Path(workdir) / "cf"
    identity = _identity(settings, data)
    if (found := _complete_run(directory, settings, identity, data)) is not None:
        logging.info("CF: %s holds a complete run of this config and data", directory)
        return found
    (directory / "metrics.json").unlink(missing_ok=True)

    began = time.perf_counter()
    model, training = trained_model(settings, data, directory)
    save_model(directory / "checkpoint.npz", settings.fields.model, model)
    store_logits(settings, model, data, workdir)
    models = {BASELINE.label: _counted(BASELINE, architecture_of(BASELINE, data, {}), data)}
    models[settings.kind.label] = model
    train_items = data.splits["train_sequences"].items
    count_I = np.bincount(train_items, minlength=data.catalogue.num_items)
    filter_seen = settings.fields.filter_seen
    metrics = {
        "identity": identity,
        "results": {
            label: evaluate_model(model, data, filter_seen=filter_seen)
            for label, model in models.items()
        },
        "profiles": {
            label: profile(model, data.splits["test"], count_I) for label, model in models.items()
        },
        "training": training,
        "seconds": time.perf_counter() - began,
    }
    write_text(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    (directory / "training.npz").unlink(missing_ok=True)
    return metrics


def trained_model(settings: CFSettings, data: RecData, directory: Path) -> tuple[CFModel, dict]:
    """The model of the settings, trained (or read), and the record of its training."""
    kind, config = settings.kind, settings.training
    if weights := settings.fields.weights:
        return read_sasrec(weights, settings.architecture), {"weights": weights}
    if config is None:
        return _counted(kind, settings.architecture, data), {}
    fresh = kind.module(settings.architecture, rngs=nnx.Rngs(config.seed))
    train = data.splits["train" if config.targets == "last" else "train_sequences"]
    fresh.fit_statistics(train)
    checkpoint = directory / "training.npz"
    fitted = fit(fresh, train, data.splits["validation"], config, checkpoint=checkpoint)
    return fitted.model, {"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}


def store_logits(settings: CFSettings, model: CFModel, data: RecData, workdir: Path) -> None:
    """Writes the logits of every split to its store."""
    fields = settings.fields
    table_IxD, bias_I = host_items(model)
    for split, sequences in data.splits.items():
        positions = None if split == "train_sequences" else sequences.last_positions
        rows = user_vectors(model, sequences, positions)
        factorised = {"vectors": rows, "item_table": table_IxD, "item_bias": bias_I}
        write_store(
            split_path(fields.logits, workdir, split),
            sequences,
            data.catalogue,
            **({"logits": rows} if table_IxD is None else factorised),
            cf_model=settings.kind.label,
            history_length=settings.architecture.history_length,
            dtype=fields.dtype,
            top_k=fields.top_k,
        )


def evaluate_model(
    model: CFModel, data: RecData, *, filter_seen: bool = False
) -> dict[str, dict[str, float]]:
    """Full ranking of the validation and test rows, and of the tied and untied test rows."""
    results = {}
    for split in EVALUATED:
        rows = data.splits[split]
        seen_RxS = None
        if filter_seen:
            seen_RxS, _ = rows.histories_and_targets(max(int(rows.lengths.max()) - 1, 1))
        scores = score_targets(model, rows, seen_RxS)
        results[split] = _means(scores, np.ones(len(rows), bool))
        if split == "test":
            # Among tied interactions the order is arbitrary, so they are also reported apart.
            for name, chosen_R in (("test, tied", rows.tied), ("test, untied", ~rows.tied)):
                if chosen_R.any():
                    results[name] = _means(scores, chosen_R)
    return results


def results_table(metrics: Mapping) -> Table:
    """The results of `run_cf` as a table of what fits 80 columns; metrics.json has the rest."""
    columns = {"HR@10": "hr@10", "NDCG@10": "ndcg@10", "NLL": "nll", "entropy": "entropy"}
    rows = {
        f"{model}, {subset}": {"rows": values["rows"]}
        | {column: values[name] for column, name in columns.items()}
        for model, subsets in metrics["results"].items()
        for subset, values in subsets.items()
    }
    title = "CF models, ranking the whole catalogue"
    return console_table(rows, title=title, first_column="model, rows")


def _counted(kind: ModelKind, architecture: Any, data: RecData) -> CFModel:
    """A model that is fitted by its statistics of the training data alone."""
    model = kind.module(architecture, rngs=nnx.Rngs(0))
    model.fit_statistics(data.splits["train_sequences"])
    return model


def _means(scores: RowScores, chosen_R: np.ndarray) -> dict[str, float]:
    means = {name: float(getattr(scores, name)[chosen_R].mean()) for name in ("nll", "entropy")}
    ranked = mean_metrics(scores.rank[chosen_R], REPORTED)
    return ranked | means | {"rows": int(chosen_R.sum())}


def _identity(settings: CFSettings, data: RecData) -> str:
    weights = settings.fields.weights
    return fingerprint(
        [
            dataclasses.asdict(settings),
            data.catalogue.content_hash(),
            {split: sequences.content_hash() for split, sequences in data.splits.items()},
            file_sha256(Path(weights)) if weights and Path(weights).is_file() else "",
        ]
    )


def _complete_run(
    directory: Path, settings: CFSettings, identity: str, data: RecData
) -> dict | None:
    """The metrics of a complete run, or None: there is none, or one of its stores is damaged."""
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        if metrics["identity"] != identity:
            return None
        for split, sequences in data.splits.items():
            path = split_path(settings.fields.logits, directory.parent, split)
            open_store(path, sequences, data.catalogue)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics
