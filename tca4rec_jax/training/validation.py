"""Validation while training: when, by which metric, which step is the best, when to stop.

All that follows from validations follows from their lines in the log, so a run that goes on after
an interruption chooses what it would have chosen without one.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, Natural, NotNegative, Range, check_fields
from tca4rec_jax.training.state import TrainState

NLL = "nll"
SECTION = "validation"  # of the config, and the first part of a metric's name in the log
BY_TITLE = " by title"  # after a metric's name
_RANKING_METRIC = re.compile(rf"(?:hr|ndcg|mrr)@([1-9]\d*)(?:{BY_TITLE})?")


def _is_metric(name: str) -> bool:
    return name == NLL or bool(_RANKING_METRIC.fullmatch(name))


@dataclass(frozen=True)
class ValidationConfig:
    """Validation while training: a sample of validation rows is ranked, as evaluation ranks rows.

    Attributes:
      every: steps between validations, each of which is a checkpoint, too, and so is the last step;
        0: never.
      every_epochs: the same in epochs, such as 0.5, rounded to steps.
      rows: how many are sampled with evaluation.seed, whatever the run's seed is; 0 takes all.
      beams: of their search; by default decoding.beams.
      metric: chooses the best step: 'nll' (of a title, at the best of evaluation.temperatures), or
        such as 'ndcg@10' (by item) or 'hr@3 by title'.
      min_gain: a validation is the new best one if it is better by more than this.
      patience: training ends after so many validations in a row without a new best one; 0: never.

    Raises UserError for a value outside these, or both `every` and `every_epochs`.
    """

    every: Natural = 0
    every_epochs: NotNegative = 0.0
    rows: Natural = 400
    beams: Count | None = None
    metric: Annotated[str, Range("'nll', or such as 'ndcg@10' or 'hr@3 by title'", _is_metric)] = (
        NLL
    )
    min_gain: NotNegative = 0.0
    patience: Natural = 0

    def __post_init__(self):
        check_fields(self, "validation.")
        if self.every and self.every_epochs:
            raise UserError(
                f"validation.every is {self.every} and validation.every_epochs "
                f"{self.every_epochs:g}: give one of them"
            )

    @property
    def is_on(self) -> bool:
        """Whether a run is validated at all."""
        return self.every > 0 or self.every_epochs > 0

    @property
    def cutoff(self) -> int:
        """K of the metric; 0 for the NLL."""
        match = _RANKING_METRIC.fullmatch(self.metric)
        return int(match[1]) if match else 0

    def steps(self, per_epoch: int) -> int:
        """Steps between validations, with so many steps an epoch."""
        return self.every or max(round(self.every_epochs * per_epoch), 1)


class Outcome(NamedTuple):
    """What follows from the validations of a run so far."""

    best: int | None = None  # the step of the best one; None before the first
    without_gain: int = 0  # how many have come after it
    ended: bool = False  # whether they were as many as validation.patience

    @classmethod
    def of(cls, config: ValidationConfig, found: Mapping[int, Mapping[str, float]]) -> "Outcome":
        """Of validations {step: {metric: value}}, whatever their order; NaN is the worst value."""
        sign = -1.0 if config.metric == NLL else 1.0
        best, best_value = None, -math.inf
        for step in sorted(found):
            value = sign * found[step][config.metric]
            value = -math.inf if math.isnan(value) else value
            if best is None or value - best_value > config.min_gain:
                best, best_value = step, value
        without_gain = sum(step > best for step in found) if best is not None else 0
        return cls(best, without_gain, 0 < config.patience <= without_gain)


def validations_of(lines: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """{step: {metric: value}} of the validations among the lines of a log."""
    found = {}
    for line in lines:
        names = [name for name in line if name.startswith(f"{SECTION}/")]
        if names:
            found[line["step"]] = {name.removeprefix(f"{SECTION}/"): line[name] for name in names}
    return found


@dataclass(frozen=True)
class Validation:
    """How a loop validates.

    Attributes:
      config: what follows from a validation.
      every: steps between validations.
      metrics_of: (state, a function to call after every batch of rows) -> {metric: value}, the same
        in all processes.
    """

    config: ValidationConfig
    every: int
    metrics_of: Callable[[TrainState, Callable[[], None]], dict[str, float]]
