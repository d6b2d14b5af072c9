"""A trained CF model as one .npz file: its architecture and its parameters by name."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.sasrec import SASRec, SASRecConfig

_CONFIG = "config"


def save_sasrec(path: Path | str, model: SASRec) -> None:
    """Writes the model beside `path`, then renames."""
    path = Path(path)
    arrays = {name: np.asarray(value) for name, value in _named_parameters(model).items()}
    config = json.dumps(dataclasses.asdict(model.config))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        np.savez(file, **{_CONFIG: np.array(config)}, **arrays)
    os.replace(beside, path)


def load_sasrec(path: Path | str) -> SASRec:
    """Reads what `save_sasrec` wrote.

    Raises:
      ValueError: the file is missing or damaged, or a parameter is missing, unknown or of another
        shape (named).
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        config = SASRecConfig(**json.loads(str(arrays.pop(_CONFIG))))
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a SASRec checkpoint ({error}); run launch/train_cf.py"
        ) from error
    abstract = nnx.eval_shape(lambda: SASRec(config, rngs=nnx.Rngs(0)))
    shapes = {name: value.shape for name, value in _named_parameters(abstract).items()}
    if set(shapes) != set(arrays):
        raise ValueError(
            f"{path}: missing parameters {sorted(set(shapes) - set(arrays))}, unknown parameters "
            f"{sorted(set(arrays) - set(shapes))}"
        )
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {arrays[name].shape}, the architecture needs {shape}"
            )
    graph, params = nnx.split(abstract, nnx.Param)
    params = jax.tree_util.tree_map_with_path(
        lambda place, _: jnp.asarray(arrays[_name(place)]), params
    )
    return nnx.merge(graph, params)


def _named_parameters(model: SASRec) -> dict[str, jax.Array]:
    params = nnx.state(model, nnx.Param)
    return {_name(place): value for place, value in jax.tree_util.tree_leaves_with_path(params)}


def _name(place) -> str:
    """Keys of a path joined by dots, such as 'blocks.0.query.kernel'."""
    keys = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in place]
    return ".".join(key for key in keys if key not in ("value", ".value"))
