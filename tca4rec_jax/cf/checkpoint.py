"""A trained CF model as one .npz file: its name and architecture, and its arrays by name."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import write_npz

_TEXT = "config"
_Model = TypeVar("_Model", bound=CFModel)


def save_model(path: Path | str, name: str, model: CFModel) -> None:
    """Writes the model, called `name` in MODELS."""
    config = {"model": name, **dataclasses.asdict(model.config)}
    arrays = {key: variable[...] for key, variable in _named_variables(model).items()}
    write_arrays(path, arrays, json.dumps(config))


def load_model(path: Path | str) -> tuple[str, CFModel]:
    """Reads what `save_model` wrote: (its name in MODELS, the model).

    Raises UserError if the file is missing or damaged, or a parameter is missing, unknown or of
    another shape (named).
    """
    arrays, text = read_arrays(path)
    try:
        fields = json.loads(text)
        name = fields.pop("model", "sasrec")
        kind = MODELS[name]
        config = kind.config(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a CF checkpoint ({error!r})") from error
    abstract = nnx.eval_shape(lambda: kind.module(config, rngs=nnx.Rngs(0)))
    variables = _named_variables(abstract)
    missing, unknown = sorted(set(variables) - set(arrays)), sorted(set(arrays) - set(variables))
    if missing or unknown:
        raise UserError(f"{path}: missing parameters {missing}, unknown parameters {unknown}")
    for key, variable in variables.items():
        found = arrays[key].shape
        if isinstance(variable, nnx.Param) and found != variable.shape:
            raise UserError(f"{path}: {key} has shape {found}, the architecture {variable.shape}")
    return name, filled(abstract, arrays)


def filled(abstract: _Model, arrays: Mapping[str, np.ndarray]) -> _Model:
    """The model of an abstract one (nnx.eval_shape) and its arrays by dotted names."""
    graph, state = nnx.split(abstract)
    variables = [
        (path, variable.replace(jnp.asarray(arrays[_name(path)])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(variables))


def write_arrays(path: Path | str, arrays: Mapping[str, Any], text: str) -> None:
    """Writes an .npz file of arrays and one text, whole or not at all."""
    write_npz(Path(path), **{_TEXT: np.array(text)}, **arrays)


def read_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], str]:
    """What `write_arrays` wrote; raises UserError naming the file if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, str(arrays.pop(_TEXT))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a CF checkpoint ({error}); run launch/train_cf.py"
        ) from error


def _named_variables(model: CFModel) -> dict[str, nnx.Variable]:
    return {_name(path): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def _name(path: tuple) -> str:
    """A variable's path joined by dots, such as 'blocks.0.query.kernel'."""
    return ".".join(map(str, path))
