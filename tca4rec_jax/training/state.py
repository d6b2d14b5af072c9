"""The state of a training run, its metrics, and the optimizer that updates it.

A checkpoint holds a `TrainState`, so inference reads this module and `checkpoint`, not the loop.
"""

from collections.abc import Collection, Mapping
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


def make_schedule(
    *, learning_rate: float, warmup_steps: int, total_steps: int, schedule: str = "linear"
) -> optax.Schedule:
    """Linear warm-up, then to zero on a line ('linear') or on half a wave ('cosine')."""
    warmup = min(warmup_steps, max(total_steps - 1, 0))
    up = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup)
    steps = max(total_steps - warmup, 1)
    down = optax.linear_schedule(learning_rate, 0.0, steps)
    if schedule == "cosine":
        down = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.join_schedules([up, down], [warmup])


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    weight_decay: float,
    clip: float,
    schedule: str = "linear",
    decay_of: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """AdamW on `make_schedule`; gradients are clipped by norm.

    `decay_of` is {part of the decoder: the weight decay of its parameters}, where it differs.
    """

    def decay(updates, params):
        def of(path, update, param):
            return update + (decay_of or {}).get(part_of(path), weight_decay) * param

        return jax.tree.map_with_path(of, updates, params)

    rate = make_schedule(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        schedule=schedule,
    )
    scaled = optax.scale_by_learning_rate(rate)
    adamw = optax.chain(optax.scale_by_adam(), optax.stateless(decay), scaled)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def held_parts(config: ConfigDict) -> list[str]:
    """The parts of a decoder, of those that are not pretrained, that training leaves alone."""
    return [part for part, section in SECTION_OF_PART.items() if not config[section].train]


def part_of(path: tuple) -> str:
    """The part of the decoder ('adapters', 'layers', ..) that a leaf of its state belongs to."""
    return next((str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)), "")


def hold(params: Tree, parts: Collection[str]) -> Tree:
    """The parameters, without a gradient of those in some parts: an optimizer leaves them alone."""

    def of(path, leaf):
        return jax.lax.stop_gradient(leaf) if part_of(path) in parts else leaf

    return jax.tree.map_with_path(of, params) if parts else params
