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
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging
from flax import nnx
from rich.box import SIMPLE
from rich.table import Table

from tca4rec_jax.cf.checkpoint import save_model
from tca4rec_jax.cf.logits_format import DTYPES
from tca4rec_jax.cf.logits_store import open_store, split_path
from tca4rec_jax.cf.logits_writer import write_store
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.cf.pytorch_sasrec import read_sasrec
from tca4rec_jax.cf.scoring import (
    RowScores,
    check_history_length,
    item_arrays,
    lazy_user_vectors,
    profile,
    score_rows,
)
from tca4rec_jax.cf.trainer import FitConfig, fit
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.errors import UserError
from tca4rec_jax.metrics import CUTOFFS, mean_metrics

EVALUATED = ("validation", "test")
REPORTED = (*CUTOFFS, 20)
_STORED = ("logits", "dtype", "top_k", "filter_seen", "weights")


@dataclasses.dataclass(frozen=True)
class CFSettings:
    """`config.cf`, checked and split up.

    Attributes:
      name: a key of MODELS.
      architecture: the config of its module.
      training: how it is trained; None if it is not.
      weights: a PyTorch checkpoint to read instead of training; '' trains.
      logits: where the stores lie; '' is workdir/cf/logits.
      dtype, top_k: of the stores, see logits_writer.write_store.
      filter_seen: whether a row's history is left out of its ranking.
    """

    name: str
    architecture: object
    training: FitConfig | None
    weights: str = ""
    logits: str = ""
    dtype: str = "float32"
    top_k: int = 0
    filter_seen: bool = False

    @classmethod
    def of(cls, config: Mapping, data: RecData) -> "CFSettings":
        """Raises UserError naming the field if one is unknown or out of range."""
        fields = {"model": None, **config}
        if (name := fields.pop("model")) not in MODELS:
            raise UserError(f"cf.model is {name!r}: expected one of {tuple(MODELS)}")
        kind = MODELS[name]
        training = {field.name for field in dataclasses.fields(FitConfig)}
        known = set().union(*(other.fields for other in MODELS.values()), training, _STORED)
        if unknown := sorted(set(fields) - known):
            raise UserError(
                f"cf: unknown fields {unknown}; expected model, {', '.join(sorted(known))}"
            )
        given = {key: value for key, value in fields.items() if value is not None}
        chosen = {key: given[key] for key in kind.fields & set(given)}
        stored = {key: given[key] for key in _STORED if key in given}
        if stored.get("dtype", "float32") not in DTYPES:
            raise UserError(f"cf.dtype is {stored['dtype']!r}: expected one of {DTYPES}")
        if stored.get("weights") and name != "sasrec":
            raise UserError("cf.weights reads PyTorch checkpoints of cf.model 'sasrec' only")
        fit_config = None
        if kind.training is not None:
            own = dict(kind.training)
            fit_config = FitConfig(**own | {k: given[k] for k in training & set(given)})
        return cls(name, _architecture(kind, chosen, data), fit_config, **stored)


def run_cf(config: Mapping, data: RecData, workdir: Path, *, history_length: int) -> dict:
    """Trains and stores, or finds a complete run of the same config and data.

    Args:
      config: `config.cf`: see CFSettings, the models' architectures and FitConfig.
      data: the prepared data.
      workdir: results go below workdir/cf.
      history_length: of the data's rows; the CF model must be able to read as much.

    Returns:
      The contents of metrics.json: 'results' is {model: {subset: {'hr@K', 'ndcg@K', 'nll',
      'entropy', 'rows'}}}; subsets are validation, test, 'test, tied' and 'test, untied';
      'profiles' is {model: what profile.profile gives for the test rows}.

    Raises:
      UserError: unknown fields or values, a history longer than the model's.
    """
    settings = CFSettings.of(config, data)
    check_history_length(history_length, settings.architecture.history_length)
    directory = Path(workdir) / "cf"
    identity = _identity(config, data)
    if (found := _complete_run(directory, settings, identity, data)) is not None:
        logging.info("CF: %s holds a complete run of this config and data", directory)
        return found
    (directory / "metrics.json").unlink(missing_ok=True)

    began = time.perf_counter()
    model, training = trained_model(settings, data, directory)
    save_model(directory / "checkpoint.npz", settings.name, model)
    store_logits(settings, model, data, workdir)
    baseline = "popularity"
    models = {MODELS[baseline].label: _counted(MODELS[baseline], data)}
    models[MODELS[settings.name].label] = model
    popularity_I = _counts(data)
    metrics = {
        "identity": identity,
        "results": {
            label: evaluate_model(model, data, filter_seen=settings.filter_seen)
            for label, model in models.items()
        },
        "profiles": {
            label: profile(model, data.splits["test"], popularity_I)
            for label, model in models.items()
        },
        "training": training,
        "seconds": time.perf_counter() - began,
    }
    beside = directory / ".metrics.json.partial"
    beside.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(beside, directory / "metrics.json")
    (directory / "training.npz").unlink(missing_ok=True)
    return metrics


def trained_model(settings: CFSettings, data: RecData, directory: Path) -> tuple[nnx.Module, dict]:
    """The model of the settings, trained (or read), and the record of its training."""
    if settings.weights:
        model = read_sasrec(settings.weights, settings.architecture)
        return model, {"weights": settings.weights}
    if settings.training is None:
        return _counted(MODELS[settings.name], data, settings.architecture), {}
    config = settings.training
    fresh = MODELS[settings.name].module(settings.architecture, rngs=nnx.Rngs(config.seed))
    train = data.splits["train" if config.labels == "target" else "train_sequences"]
    if hasattr(fresh, "fit_statistics"):
        fresh.fit_statistics(train)
    fitted = fit(
        fresh,
        train,
        data.splits["validation"],
        config,
        checkpoint=directory / "training.npz",
    )
    return fitted.model, {"best_epoch": fitted.best_epoch, "epochs": fitted.epochs}


def store_logits(settings: CFSettings, model: nnx.Module, data: RecData, workdir: Path) -> None:
    """Writes the logits of every split to its store."""
    table_IxD, bias_I = item_arrays(model)
    for split, sequences in data.splits.items():
        positions = None if split == "train_sequences" else sequences.last_positions
        rows = lazy_user_vectors(model, sequences, positions)
        factorised = {"vectors": rows, "item_table": table_IxD, "item_bias": bias_I}
        write_store(
            split_path(settings.logits, workdir, split),
            sequences,
            data.catalogue,
            **({"logits": rows} if table_IxD is None else factorised),
            cf_model=MODELS[settings.name].label,
            history_length=settings.architecture.history_length,
            dtype=settings.dtype,
            top_k=settings.top_k,
        )


def evaluate_model(
    model: nnx.Module, data: RecData, *, filter_seen: bool = False
) -> dict[str, dict[str, float]]:
    """Full ranking of the validation and test rows, and of the tied and untied test rows."""
    results = {}
    for split in EVALUATED:
        rows = data.splits[split]
        target_R, seen_RxS = rows.items[rows.last_positions], None
        if filter_seen:
            seen_RxS, _ = rows.histories_and_targets(max(int(rows.lengths.max()) - 1, 1))
        vector_RxD = lazy_user_vectors(model, rows, rows.last_positions)
        scores = score_rows(vector_RxD, *item_arrays(model), target_R, seen_RxS)
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


def _architecture(kind, chosen: dict, data: RecData):
    """The config of a model for these data."""
    sizes = {"num_items": data.catalogue.num_items}
    if "num_users" in {field.name for field in dataclasses.fields(kind.config)}:
        sizes["num_users"] = len(np.unique(data.splits["train_sequences"].user))
    return kind.config(**sizes, **chosen)


def _counted(kind, data: RecData, architecture=None) -> nnx.Module:
    """A model that is fitted by its statistics of the training data alone."""
    architecture = architecture or _architecture(kind, {}, data)
    model = kind.module(architecture, rngs=nnx.Rngs(0))
    model.fit_statistics(data.splits["train_sequences"])
    return model


def _counts(data: RecData) -> np.ndarray:
    return np.bincount(data.splits["train_sequences"].items, minlength=data.catalogue.num_items)


def _means(scores: RowScores, chosen_R: np.ndarray) -> dict[str, float]:
    means = {name: float(getattr(scores, name)[chosen_R].mean()) for name in ("nll", "entropy")}
    ranked = mean_metrics(scores.rank[chosen_R], REPORTED)
    return ranked | means | {"rows": int(chosen_R.sum())}


def _identity(config: Mapping, data: RecData) -> dict:
    hashes = {split: sequences.content_hash() for split, sequences in data.splits.items()}
    identity = {
        "config": dict(config),
        "catalogue": data.catalogue.content_hash(),
        "splits": hashes,
    }
    if (weights := Path(config.get("weights") or "")).is_file():
        identity["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return identity


def _complete_run(directory: Path, settings: CFSettings, identity: dict, data: RecData):
    try:
        metrics = json.loads((directory / "metrics.json").read_text())
        if metrics["identity"] != identity:
            return None
        for split, sequences in data.splits.items():
            place = split_path(settings.logits, directory.parent, split)
            open_store(place, sequences, data.catalogue)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metrics
