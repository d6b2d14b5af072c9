"""A trained CF model as one .npz file: its name, architecture, provenance, and arrays by name."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.item_tables import frozen_fields, with_frozen_tables
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.fileio import read_npz, write_npz
from tca4rec_jax.provenance import Provenance, StaleError

_TEXT, _MADE_FROM, _FROZEN = "config", "made_from", "frozen_items"
_REMEDY = "run launch/train_cf.py"
_Model = TypeVar("_Model", bound=CFModel)


def save_model(path: Path | str, name: str, model: CFModel, made_from: Provenance) -> None:
    """Writes the model, called `name` in MODELS."""
    variables = {_name(keys): value[...] for keys, value in nnx.to_flat_state(nnx.state(model))}
    config = {"model": name, _FROZEN: frozen_fields(model), **dataclasses.asdict(model.config)}
    write_arrays(path, variables, json.dumps(config | {_MADE_FROM: dataclasses.asdict(made_from)}))


def load_model(path: Path | str, now: Mapping[str, Any] | None = None) -> tuple[str, CFModel]:
    """Reads what `save_model` wrote: (its name in MODELS, the model).

    Raises UserError if the file is missing or damaged, and as `filled`; StaleError if the model was
    made from other inputs than those of `now`.
    """
    arrays, text = read_arrays(path)
    with reading(path, "CF checkpoint", remedy=_REMEDY):
        fields = json.loads(text)
        made_from = fields.pop(_MADE_FROM, None)
        name, frozen = fields.pop("model", "sasrec"), fields.pop(_FROZEN, {})
        kind = MODELS[name]
        config = kind.config(**fields)
    if made_from is None:
        raise StaleError(f"{path} does not say what it was made from: run launch/train_cf.py again")
    Provenance.from_fields(made_from, path).check(now or {}, path)

    def fresh() -> CFModel:
        model = kind.module(config, rngs=nnx.Rngs(0))
        return with_frozen_tables(model, **frozen) if frozen else model

    return name, filled(path, fresh, arrays)


def filled(
    path: Path | str, fresh: Callable[[], _Model], arrays: Mapping[str, np.ndarray]
) -> _Model:
    """The model that `fresh` makes, with the arrays that a file has for its variables.

    They have the variables' dotted names; `fresh` is traced, not run.

    Raises UserError for one that is missing, unknown or, if trained, of another shape (named).
    """
    graph, state = nnx.split(nnx.eval_shape(fresh))
    variables = nnx.to_flat_state(state)
    names = {_name(keys) for keys, _ in variables}
    missing, unknown = sorted(names - set(arrays)), sorted(set(arrays) - names)
    if missing or unknown:
        raise UserError(f"{path}: missing parameters {missing}, unknown parameters {unknown}")
    values = []
    for keys, variable in variables:
        array = arrays[_name(keys)]
        if isinstance(variable, nnx.Param) and array.shape != variable.shape:
            raise UserError(
                f"{path}: {_name(keys)} has shape {array.shape}, the architecture {variable.shape}"
            )
        values.append((keys, variable.replace(jnp.asarray(array))))
    return nnx.merge(graph, nnx.from_flat_state(values))


def write_arrays(path: Path | str, arrays: Mapping[str, Any], text: str) -> None:
    """Writes an .npz file of arrays and one text, whole or not at all."""
    write_npz(Path(path), **{_TEXT: np.array(text)}, **arrays)


def read_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], str]:
    """What `write_arrays` wrote; raises UserError naming the file if it cannot be read."""
    with reading(path, "CF checkpoint", remedy=_REMEDY):
        arrays = read_npz(Path(path), remedy=_REMEDY)
        return arrays, str(arrays.pop(_TEXT))


def _name(path: tuple) -> str:
    """A variable's path joined by dots, such as 'blocks.0.query.kernel'."""
    return ".".join(map(str, path))
