"""From prepared data to CF logits: trains the CF model, ranks, writes the logits of every split.

Layout written below a work directory:
  cf/checkpoint.npz      the trained model (not for most popular)
  cf/logits/<split>/     one logits store per split: an entry per flat position of the users'
                         sequences, an entry per row (for its target) of the other splits
  cf/metrics.json        written last: it stands for a complete run
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx
from rich.box import SIMPLE
from rich.table import Table

from tca4rec_jax.cf.checkpoint import save_sasrec
from tca4rec_jax.cf.fit import FitConfig, fit
from tca4rec_jax.cf.logits_store import open_store, write_store
from tca4rec_jax.cf.popularity import popularity_logits
from tca4rec_jax.cf.sasrec import SASRec, SASRecConfig
from tca4rec_jax.cf.scoring import RowScores, check_history_length, score_rows, user_vectors
from tca4rec_jax.data.sequences import ItemSequences, RecData
from tca4rec_jax.ranking import mean_metrics

MODELS = ("sasrec", "popularity")
EVALUATED = ("validation", "test")
POPULARITY = "most popular"


@dataclasses.dataclass(frozen=True)
class CFModel:
    """A trained CF model as the rest of the run sees it.

    Attributes:
      name: for tables and manifests.
      item_table: float32 [I, D].
      item_bias: float32 [I] or None.
      vectors: (sequences, flat positions or None for all) -> float32 [m, D].
      history_length: the longest history the vectors depend on; None if they depend on none.
    """

    name: str
    item_table: np.ndarray
    item_bias: np.ndarray | None
    vectors: Callable[[ItemSequences, np.ndarray | None], np.ndarray]
    history_length: int | None


def run_cf(config: Mapping, data: RecData, workdir: Path, *, history_length: int) -> dict:
    """Trains and stores, or finds a complete run of the same config and data.

    Args:
      config: `config.cf`: 'model', and the fields of SASRecConfig and FitConfig.
      data: the prepared data.
      workdir: results go below workdir/cf.
      history_length: of the data's rows; the CF model must be able to read as much.

    Returns:
      The contents of metrics.json: 'results' is {model: {subset: {'hr@K', 'ndcg@K', 'nll',
      'entropy', 'rows'}}}; subsets are validation, test, 'test, tied' and 'test, untied'.

    Raises:
      ValueError: unknown fields or values, a history longer than the model's.
    """
    architecture, fit_config = parse_config(config, data.catalogue.num_items)
    check_history_length(history_length, architecture.history_length)
    directory = Path(workdir) / "cf"
    identity = _identity(config, data)
    if (found := _complete_run(directory, identity, data)) is not None:
        logging.info("CF: %s holds a complete run of this config and data", directory)
        return found
    (directory / "metrics.json").unlink(missing_ok=True)

    began = time.perf_counter()
    models = [_most_popular(data)]
    training: dict = {}
    if config["model"] == "sasrec":
        model, training = _train_sasrec(architecture, fit_config, data, directory)
        models.append(model)
    for split, sequences in data.splits.items():
        every = split == "train_sequences"
        positions = None if every else sequences.last_positions
        _store(directory / "logits" / split, models[-1], sequences, positions, data)
    metrics = {
        "identity": identity,
        "results": {model.name: evaluate_model(model, data) for model in models},
        "training": training,
        "seconds": time.perf_counter() - began,
    }
    beside = directory / ".metrics.json.partial"
    beside.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(beside, directory / "metrics.json")
    return metrics


def parse_config(config: Mapping, num_items: int) -> tuple[SASRecConfig, FitConfig]:
    """Splits `config.cf` into architecture and training; raises ValueError on unknown fields."""
    fields = dict(config)
    if (name := fields.pop("model", None)) not in MODELS:
        raise ValueError(f"cf.model is {name!r}: expected one of {MODELS}")
    architecture = {field.name for field in dataclasses.fields(SASRecConfig)} - {"num_items"}
    training = {field.name for field in dataclasses.fields(FitConfig)}
    if unknown := sorted(set(fields) - architecture - training):
        known = ", ".join(sorted(architecture | training))
        raise ValueError(f"cf: unknown fields {unknown}; expected model, {known}")
    return (
        SASRecConfig(num_items, **{k: v for k, v in fields.items() if k in architecture}),
        FitConfig(**{k: v for k, v in fields.items() if k in training}),
    )


def evaluate_model(model: CFModel, data: RecData) -> dict[str, dict[str, float]]:
    """Full ranking of the validation and test rows, and of the tied and untied test rows."""
    results = {}
    for split in EVALUATED:
        rows = data.splits[split]
        vector_RxD = model.vectors(rows, rows.last_positions)
        target_R = rows.items[rows.last_positions]
        scores = score_rows(vector_RxD, model.item_table, target_R, model.item_bias)
        results[split] = _means(scores, np.ones(len(rows), bool))
        if split == "test":
            # Among tied interactions the order is arbitrary, so they are also reported apart.
            for name, chosen_R in (("test, tied", rows.tied), ("test, untied", ~rows.tied)):
                if chosen_R.any():
                    results[name] = _means(scores, chosen_R)
    return results


def results_table(metrics: Mapping) -> Table:
    """The results of `run_cf` as a table."""
    columns = ("hr@10", "ndcg@10")  # what fits 80 columns; metrics.json has the rest
    table = Table(title="CF models, ranking the whole catalogue", box=SIMPLE)
    for name in ("model", "split"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", *(column.upper() for column in columns), "NLL", "entropy"):
        table.add_column(name, justify="right", no_wrap=True)
    for model, subsets in metrics["results"].items():
        for subset, values in subsets.items():
            ranked = [f"{values[column]:.4f}" for column in columns]
            softmax = [f"{values[column]:.2f}" for column in ("nll", "entropy")]
            table.add_row(model, subset, str(values["rows"]), *ranked, *softmax)
    return table


def _most_popular(data: RecData) -> CFModel:
    bias_I = popularity_logits(data.splits["train_sequences"], data.catalogue.num_items)

    def vectors(sequences, positions):
        count = len(sequences.items) if positions is None else len(positions)
        return np.zeros((count, 1), np.float32)

    return CFModel(POPULARITY, np.zeros((len(bias_I), 1), np.float32), bias_I, vectors, None)


def _train_sasrec(architecture, fit_config, data: RecData, directory) -> tuple[CFModel, dict]:
    fresh = SASRec(architecture, rngs=nnx.Rngs(fit_config.seed))
    fitted = fit(fresh, data.splits["train_sequences"], data.splits["validation"], fit_config)
    save_sasrec(directory / "checkpoint.npz", fitted.model)

    def vectors(sequences, positions):
        return user_vectors(fitted.model, sequences, positions)

    table = np.asarray(fitted.model.item_table[...])
    model = CFModel("SASRec", table, None, vectors, architecture.history_length)
    return model, {"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}


def _store(path: Path, model: CFModel, sequences: ItemSequences, positions, data: RecData) -> None:
    write_store(
        path,
        sequences,
        data.catalogue,
        vectors=model.vectors(sequences, positions),
        item_table=model.item_table,
        item_bias=model.item_bias,
        cf_model=model.name,
        history_length=model.history_length,
    )


def _means(scores: RowScores, chosen_R: np.ndarray) -> dict[str, float]:
    means = {name: float(getattr(scores, name)[chosen_R].mean()) for name in ("nll", "entropy")}
    return mean_metrics(scores.rank[chosen_R]) | means | {"rows": int(chosen_R.sum())}


def _identity(config: Mapping, data: RecData) -> dict:
    hashes = {split: sequences.content_hash() for split, sequences in data.splits.items()}
    return {"config": dict(config), "catalogue": data.catalogue.content_hash(), "splits": hashes}


def _complete_run(directory: Path, identity: dict, data: RecData) -> dict | None:
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        if metrics["identity"] != identity:
            return None
        for split, sequences in data.splits.items():
            open_store(directory / "logits" / split, sequences, data.catalogue)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics
