"""The state of a training run, its metrics, and the optimizer that updates it.

A checkpoint holds a `TrainState`, so inference reads this module and `checkpoint`, not the loop.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import optax
from flax import nnx

Tree = TypeVar("Tree")

# The parameters that are trained, by config.llm.train: a filter of nnx.split.
TRAINED = {"lora": nnx.LoRAParam, "full": nnx.Param}


class TrainState(NamedTuple):
    """What changes from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32, updates done; -1 - updates in a run that has halted
    params: nnx.State  # the trained parameters, float32: the adapters or every weight
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Metrics of one step: the loss per supervised position, the NLL per supervised title.

    Scalars, float32 on the device and float in the log.
    """

    loss: Any
    nll_per_title: Any
    grad_norm: Any


def in_dtype(params: Tree, dtype: str | None) -> Tree:
    """The parameters rounded to the dtype that the model computes in; unchanged for None."""
    return params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), params)


def make_schedule(*, learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then linear decay to zero."""
    warmup = min(warmup_steps, max(total_steps - 1, 0))
    up = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, warmup)
    down = optax.linear_schedule(learning_rate, 0.0, max(total_steps - warmup, 1))
    return optax.join_schedules([up, down], [warmup])


def make_optimizer(
    *, learning_rate: float, warmup_steps: int, total_steps: int, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW on `make_schedule`; gradients are clipped by norm."""
    steps = {"warmup_steps": warmup_steps, "total_steps": total_steps}
    schedule = make_schedule(learning_rate=learning_rate, **steps)
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)
