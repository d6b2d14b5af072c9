"""The fields of `config.cf`: those of every CF model, and each model's own with their defaults.

`config.cf.model` picks a model; `config.cf.sasrec`, `config.cf.lightgcn`... hold what the models'
dataclasses say (MODEL_FIELDS), so another model runs as its paper has it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from tca4rec_jax.cf.models.registry import MODELS, ModelKind
from tca4rec_jax.cf.trainer import FitConfig
from tca4rec_jax.data.item_vectors import vectors_content, vectors_path
from tca4rec_jax.data.sequences import RecData
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import file_sha256
from tca4rec_jax.ranges import Count, LocalPath, check_fields, one_of

MODEL_FIELDS = {
    name: tuple(filter(None, (kind.config, kind.training))) for name, kind in MODELS.items()
}
"""By model the dataclasses that its fields are those of: a class, or an object with its values."""


@dataclasses.dataclass(frozen=True)
class CFFields:
    """The CF model and its stored logits.

    Attributes:
      model: a key of cf.models.registry.MODELS; its own fields are in the section of its name.
      weights: a PyTorch SASRec to read instead of training.
      history_length: the most items that the model reads.
      filter_seen: leave a row's history out of its CF ranking.
      logits: the folder or bucket of the stores; by default WORKDIR/cf/logits.
      dtype: of the stored logits.
      top_k: keep so many logits per row and a floor; by default all, or of a model without vectors
        the 1000 highest beyond 100 thousand items.
      label_items: how many items share the soft labels of a training row: the target and the
        highest that are not in its history; by default all.
      item_vectors: a .npy file [items, width] of the catalogue's items; by default those that
        launch/embed_items.py writes in the work directory.
      item_init: start the item table from the item vectors: their principal components, or
        dimensions chosen at random, evenly spaced or by their variance; by default from noise.
      item_table: 'frozen' keeps the item vectors, behind a trained adapter to the model's width.
      item_adapter: of a frozen item table: a matrix, or two with a GELU between.
    """

    model: Annotated[str, one_of(MODELS)] = "sasrec"
    weights: LocalPath | None = None
    history_length: Count = 10
    filter_seen: bool = False
    logits: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    top_k: Count | None = None
    label_items: Count | None = None
    item_vectors: LocalPath | None = None
    item_init: Literal["pca", "random", "uniform", "variance"] | None = None
    item_table: Literal["trained", "frozen"] = "trained"
    item_adapter: Literal["linear", "mlp"] = "linear"

    def __post_init__(self):
        check_fields(self, "cf.")
        if self.weights and self.model != "sasrec":
            raise UserError("cf.weights reads PyTorch checkpoints of cf.model 'sasrec' only")
        if self.item_init and self.item_table == "frozen":
            raise UserError(
                "cf.item_init starts a trained item table: give it or item_table=frozen"
            )
        if self.takes_vectors and (self.weights or not MODELS[self.model].training):
            which = " that is read from cf.weights" if self.weights else ""
            raise UserError(
                "cf.item_init and cf.item_table=frozen need an item table that is trained: "
                f"cf.model {self.model!r}{which} has none"
            )

    @property
    def takes_vectors(self) -> bool:
        """Whether the model is made of item vectors."""
        return bool(self.item_init) or self.item_table == "frozen"


@dataclasses.dataclass(frozen=True)
class CFSettings:
    """`config.cf` for some data."""

    fields: CFFields  # those that every model shares
    architecture: Any  # the config of the model's module
    training: FitConfig | None  # None if it is not trained

    @classmethod
    def of(cls, config: Mapping, data: RecData) -> "CFSettings":
        """The settings of `config.cf`; raises UserError naming a field that is out of range."""
        fields = CFFields(**_fields_of(CFFields, config))
        kind, own = MODELS[fields.model], config.get(fields.model, {})
        architecture = {
            "history_length": fields.history_length,
            **own,
            "num_items": data.catalogue.num_items,
            "num_users": len(np.unique(data.splits["train_sequences"].user)),
        }
        training = FitConfig(**_fields_of(FitConfig, {**config, **own})) if kind.training else None
        return cls(fields, kind.config(**_fields_of(kind.config, architecture)), training)

    @property
    def kind(self) -> ModelKind:
        """The model's entry in MODELS."""
        return MODELS[self.fields.model]


def model_inputs(config: Mapping, workdir: Path) -> dict[str, Any]:
    """The fields of `config.cf` that the trained model depends on, see Provenance.

    Weights that are read instead of training, and item vectors, stand as the SHA-256 of their file.
    Raises UserError or FileNotFoundError if it is missing.
    """
    fields, kind = CFFields(**_fields_of(CFFields, config)), MODELS[config["model"]]
    own = dict(config.get(fields.model, {}))
    kinds = [kind.config, *([FitConfig] if kind.training else [])]
    shared = {name: value for kind in kinds for name, value in _fields_of(kind, config).items()}
    weights = fields.weights and file_sha256(Path(fields.weights))
    model = {fields.model: own} if own else {}
    items = item_inputs(fields, workdir)
    return {"model": fields.model, "weights": weights, **items, **shared, **model}


def item_inputs(fields: CFFields, workdir: Path) -> dict[str, Any]:
    """What of the model comes from item vectors; None for what does not."""
    path = vectors_path(fields.item_vectors, workdir) if fields.takes_vectors else None
    return {
        "item_vectors": path and vectors_content(path),
        "item_init": fields.item_init,
        "item_adapter": fields.item_adapter if fields.item_table == "frozen" else None,
    }


def store_inputs(config: Mapping, workdir: Path) -> dict[str, Any]:
    """The fields of `config.cf` that the logits of launch/train_cf.py depend on."""
    fields = CFFields(**_fields_of(CFFields, config))
    stored = {name: getattr(fields, name) for name in ("dtype", "top_k", "label_items")}
    return model_inputs(config, workdir) | stored


def vector_width(config: Mapping) -> int:
    """The width D of the vectors of `config.cf`; raises UserError if it has none."""
    own = config[config["model"]]
    if "units" not in own:
        raise UserError(f"cf.model {config['model']!r} has no vectors of a width that is set")
    return own["units"]


def _fields_of(kind: type, values: Mapping) -> dict[str, Any]:
    """Those of the values that a dataclass has as fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: values[name] for name in names & set(values)}
