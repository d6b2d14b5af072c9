"""The state of a training run, its metrics, and the parts of a decoder that it has.

A checkpoint holds a `TrainState`, so inference reads this module and `checkpoint`, not the loop.
"""

from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from tca4rec_jax.llm.projector import ProjectorParam
from tca4rec_jax.llm.vocabulary import NewRow

Tree = TypeVar("Tree")

# The parameters that training may change, by config.llm.train: a filter of nnx.split. Those of a
# part whose own section says so stay as they are all the same.
TRAINED = {
    "lora": nnx.Any(nnx.LoRAParam, ProjectorParam, NewRow),
    "full": nnx.Any(nnx.Param, ProjectorParam, NewRow),
}
# A part of a decoder that is not pretrained -> the section of the config whose `train` it has.
SECTION_OF_PART = {"adapters": "lora", "projector": "projector", "new_rows": "ids"}


class TrainState(NamedTuple):
    """What changes from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32, updates done; -1 - updates in a run that has halted
    params: nnx.State  # float32: adapters or every weight, and all else that is not pretrained
    optimizer: optax.OptState
    tau: jax.Array | None = None  # float32, the running temperature of objective.temperature


class Metrics(NamedTuple):
    """Metrics of one step: the loss per supervised position, the NLL per supervised title.

    Scalars, float32 on the device and float in the log.
    """

    loss: Any
    nll_per_title: Any
    grad_norm: Any
    tau: Any = None  # the step's, if it is adaptive


def in_dtype(params: Tree, dtype: str | None) -> Tree:
    """The parameters rounded to the dtype that the model computes in; unchanged for None."""
    return params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), params)


def held_parts(config: ConfigDict) -> tuple[str, ...]:
    """The parts of a decoder, of those that are not pretrained, that training leaves alone."""
    parts = SECTION_OF_PART.items()
    return tuple(part for part, section in parts if not config[section].train)


def part_of(path: tuple) -> str:
    """The part of the decoder ('adapters', 'layers', ..) that a leaf of its state belongs to."""
    return next((str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)), "")


def hold(params: Tree, parts: Collection[str]) -> Tree:
    """The parameters, without a gradient of those in some parts: an optimizer leaves them alone."""

    def of(path, leaf):
        return jax.lax.stop_gradient(leaf) if part_of(path) in parts else leaf

    return jax.tree.map_with_path(of, params) if parts else params
