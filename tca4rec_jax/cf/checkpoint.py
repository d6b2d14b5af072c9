"""A trained CF model as one .npz file: its name and architecture, and its arrays by name."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Statistic
from tca4rec_jax.cf.models.registry import MODELS
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import write_npz

_TEXT = "config"
_Model = TypeVar("_Model", bound=CFModel)


def save_model(path: Path | str, name: str, model: CFModel) -> None:
    """Writes the model, called `name` in MODELS."""
    config = {"model": name, **dataclasses.asdict(model.config)}
    write_arrays(path, _named_arrays(model), json.dumps(config))


def load_model(path: Path | str) -> tuple[str, CFModel]:
    """Reads what `save_model` wrote: (its name in MODELS, the model).

    Raises:
      UserError: the file is missing or damaged, or a parameter is missing, unknown or of another
        shape (named).
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
    expected = _named_arrays(abstract)
    if set(expected) != set(arrays):
        raise UserError(
            f"{path}: missing parameters {sorted(set(expected) - set(arrays))}, unknown parameters "
            f"{sorted(set(arrays) - set(expected))}"
        )
    for name_, value in _named_arrays(abstract, nnx.Param).items():
        if arrays[name_].shape != value.shape:
            raise UserError(
                f"{path}: {name_} has shape {arrays[name_].shape}, the architecture needs "
                f"{value.shape}"
            )
    return name, filled(abstract, arrays)


def filled(abstract: _Model, arrays: Mapping[str, np.ndarray]) -> _Model:
    """The model of an abstract one (nnx.eval_shape) and its arrays by dotted names."""
    graph, state = nnx.split(abstract)
    state = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[_name(path)]), state
    )
    return nnx.merge(graph, state)


def write_arrays(path: Path | str, arrays: Mapping[str, Any], text: str) -> None:
    """Writes an .npz file of arrays and one text, whole or not at all."""
    host = {name: np.asarray(value) for name, value in arrays.items()}
    write_npz(Path(path), **{_TEXT: np.array(text)}, **host)


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


def _named_arrays(model: CFModel, *kinds) -> dict[str, jax.Array]:
    state = nnx.state(model, *(kinds or ((nnx.Param, Statistic),)))
    return {_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(state)}


def _name(path) -> str:
    """Keys of a path joined by dots, such as 'blocks.0.query.kernel'."""
    attribute = isinstance(path[-1], jax.tree_util.GetAttrKey)  # the variable's own '.value'
    keys = path[:-1] if attribute else path
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
