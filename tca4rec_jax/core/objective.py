"""The settings of the soft next-token-prediction objective (TCA4Rec; MSL): core/losses.py."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tca4rec_jax.core import Array
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Bounds, Positive, Share, Temperature, check_fields


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["alpha", "alpha_last", "beta", "tau"],
    meta_fields=[
        *("form", "softmax", "mean_over", "scale_by_tau"),
        *("temperature", "eta", "tau_bounds", "tau_weight", "cf_dtype"),
    ],
)
@dataclasses.dataclass(frozen=True)
class Objective:
    """What is optimised; a pytree whose numbers may be traced and follow a schedule.

    Attributes:
      alpha: weight of the CF distribution in the soft label.
      beta: temperature of the CF logits.
      tau: temperature of the LLM's logits.
      form: 'log_expectation' as the published code has it, 'cross_entropy' as the paper describes.
      softmax: over the whole vocabulary, or over the children of the trie's node (MSL).
      mean_over: the loss is a mean over all supervised positions or, as MSL's, over the decisions:
        only with softmax=children, where the others have no loss.
      scale_by_tau: multiply the loss by tau, as MSL does: the size of a gradient then hardly
        depends on it.
      temperature: 'fixed' is tau; 'adaptive' begins with tau and follows the logits' moments (MSL,
        training/temperature.py); only with softmax=children.
      eta: of the adaptive tau: a share of the first tokens of titles.
      tau_bounds: the least and the greatest tau that a batch may ask for.
      tau_weight: of the newest batch in the running tau.
      cf_dtype: of the CF logits, the probabilities made of them and their sums. In the 'bfloat16'
        of the published code (published_projection.py) next tokens add up to 0.95 to 1.
      alpha_last: the alpha of the last step, to which it goes on a line; None: it stays.
    """

    alpha: Share = 0.1
    beta: Temperature = 1.0
    tau: Temperature = 1.0
    form: Literal["log_expectation", "cross_entropy"] = "log_expectation"
    softmax: Literal["vocabulary", "children"] = "vocabulary"
    mean_over: Literal["positions", "decisions"] = "positions"
    scale_by_tau: bool = False
    temperature: Literal["fixed", "adaptive"] = "fixed"
    eta: Positive = 0.25
    tau_bounds: Bounds = (1.5, 5.0)
    tau_weight: Share = 0.05
    cf_dtype: Literal["float32", "bfloat16"] = "float32"
    alpha_last: Share | None = None

    def __post_init__(self):
        needed = {"softmax": "children", "cf_dtype": "float32"}
        for name, default in (("mean_over", "positions"), ("temperature", "fixed")):
            value = getattr(self, name)
            for other, only in needed.items():
                if value != default and getattr(self, other) != only:
                    raise UserError(
                        f"objective.{name} is {value!r}, which is for objective.{other}={only}: "
                        f"set that, or objective.{name}={default}"
                    )

    def at(self, step: Array, steps: int) -> "Objective":
        """That of one of so many steps (from 0), which may be traced."""
        if self.alpha_last is None:
            return self
        done = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
        alpha: Any = self.alpha + done * (self.alpha_last - self.alpha)
        return dataclasses.replace(self, alpha=alpha, alpha_last=None)

    @property
    def adapts(self) -> bool:
        """Whether tau follows the logits."""
        return self.temperature == "adaptive"

    @property
    def rounds(self) -> bool:
        """Whether the CF distributions are rounded, so that forced tokens have a loss, too."""
        return self.cf_dtype == "bfloat16"

    def check(self) -> "Objective":
        """Returns itself; raises UserError naming the field that is out of range."""
        check_fields(self, "objective.")
        return self
