"""The optimizer of a training run, and its schedule of the learning rate."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, Natural, NotNegative, Positive, Share
from tca4rec_jax.training.state import part_of

_B1, _B2 = 0.9, 0.999  # of the running means of gradients and of their squares


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a learning rate that warms up and then falls.

    Attributes:
      learning_rate: the highest, after the warm-up.
      warmup_steps: steps until then.
      warmup_fraction: the same as a fraction of training.steps, rounded up, in the place of
        warmup_steps.
      warmup_from_zero: begin with the rate 0, as transformers does, not with learning_rate /
        warmup_steps.
      schedule: how it falls after the warm-up: on a line, on half a cosine wave, or not at all.
      decay_steps: the step at which it is 0, not before the last; by default training.steps.
      weight_decay: decoupled.
      moments: of every trained weight: 'float32' (8 bytes); 'bfloat16': the first in bfloat16 (6
        bytes); 'factored': the second of matrices of at least 128 x 128 as Adafactor has it besides
        (2 bytes), with llm.train=full.
      epsilon: what Adam adds to the root of the second moment; 'factored' adds none.
      clip: the largest norm of a gradient; 0: any.
    """

    learning_rate: Positive = 1e-4
    warmup_steps: Natural = 20
    warmup_fraction: Share | None = None
    warmup_from_zero: bool = False
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    decay_steps: Count | None = None
    weight_decay: NotNegative = 0.01
    moments: Literal["float32", "bfloat16", "factored"] = "float32"
    epsilon: Positive = 1e-8
    clip: NotNegative = 1.0

    def __post_init__(self):
        if self.decay_steps is not None and self.schedule == "constant":
            raise UserError(
                f"optimizer.decay_steps is {self.decay_steps}, but optimizer.schedule=constant "
                "never falls: leave one of them out"
            )


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then `config.schedule`, in a run of total_steps."""
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.warmup_fraction is not None:
        warmup = math.ceil(round(config.warmup_fraction * total_steps, 6))
    end = config.decay_steps or total_steps
    warmup = min(warmup, max(end - 1, 0))
    first = 0.0 if config.warmup_from_zero else rate / max(warmup, 1)
    steps = max(end - warmup, 1)
    after = {
        "linear": optax.linear_schedule(rate, 0.0, steps),
        "cosine": optax.cosine_decay_schedule(rate, steps),
        "constant": optax.constant_schedule(rate),
    }
    up = optax.linear_schedule(first, rate, warmup)
    return optax.join_schedules([up, after[config.schedule]], [warmup])


# Equal optimizers are the same object, so that a step that has one is compiled once.
@functools.lru_cache(maxsize=8)
def make_optimizer(
    config: OptimizerConfig, total_steps: int, *, decay_of: tuple[tuple[str, float], ...] = ()
) -> optax.GradientTransformation:
    """AdamW on `make_schedule`; gradients are clipped by norm.

    `decay_of` are (part of the decoder, the weight decay of its parameters), where it differs.
    """
    decays = dict(decay_of)

    def decay(updates, params):
        def of(path, update, param):
            return update + decays.get(part_of(path), config.weight_decay) * param

        return jax.tree.map_with_path(of, updates, params)

    scaled = optax.scale_by_learning_rate(make_schedule(config, total_steps))
    adamw = optax.chain(_scale_by_moments(config), optax.stateless(decay), scaled)
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, adamw)


def _scale_by_moments(config: OptimizerConfig) -> optax.GradientTransformation:
    """Running means of gradients over the roots of those of their squares.

    In less memory as Zhai et al. have them (arXiv 2106.04560, section 3.4): Adam's first moment in
    bfloat16; Adafactor's second moment, a row and a column of every large matrix, with the decay
    1 - step^-0.8, at most Adam's, and no scale of the parameter, so that learning rates are Adam's.
    """
    if config.moments != "factored":
        dtype = jnp.bfloat16 if config.moments == "bfloat16" else None
        return optax.scale_by_adam(_B1, _B2, config.epsilon, mu_dtype=dtype)

    def decay(step, exponent):
        return jnp.minimum(1.0 - (step + 1.0) ** -exponent, _B2)

    squares = optax.scale_by_factored_rms(decay_rate_fn=decay)
    return optax.chain(squares, optax.ema(_B1, accumulator_dtype=jnp.bfloat16))
