"""The validation of a training state: the evaluation of lists, on rows of the validation split."""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from tca4rec_jax.config import score_weights
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.kept_rankings import hit_ranks
from tca4rec_jax.evaluation.llm_rankings import Ranker
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.metrics import mean_metrics
from tca4rec_jax.training.state import TrainState
from tca4rec_jax.training.validation import BY_TITLE, NLL, Validation


class Validator:
    """Ranks the same rows, sampled once, at every call; the programs are compiled by the first."""

    def __init__(self, experiment: Experiment):
        """Raises UserError for a recommender that ranks nothing, or a split without rows."""
        if (kind := experiment.recipe.evaluated_by) != "rankings":
            raise UserError(
                f"recommender.name is {experiment.config.recommender.name!r}, whose {kind} are not "
                "validated while training: set validation.every=0 and validation.every_epochs=0"
            )
        self._experiment, self._config = experiment, experiment.validation
        self._rows = EvaluationRows.sample(experiment, "validation", self._config.rows)
        if not len(self._rows):
            raise UserError("the validation split has no rows: set validation.every=0")
        self._weights = score_weights(experiment.config, 0.0)

    @cached_property
    def _ranker(self) -> Ranker:
        """Made at the first validation: a training state goes to the devices before it."""
        return Ranker.of(self._experiment, self._rows, beams=self._config.beams)

    def of_states(self, decoder_of: Callable[[TrainState], Decoder], per_epoch: int) -> Validation:
        """For a training loop with so many steps an epoch, whose states are these decoders."""
        return Validation(
            self._config,
            self._config.steps(per_epoch),
            lambda state, after_batch: self(decoder_of(state), after_batch),
        )

    def __call__(self, decoder: Decoder, after_batch: Callable[[], None]) -> dict[str, float]:
        """{'nll': .., 'hr@K': .., ..} of a decoder in training, by the LLM alone.

        As launch/evaluate.py finds them with the checkpoint, on the same rows. `after_batch` is
        called after every batch of prompts.
        """
        experiment, config = self._experiment, self._config
        jobs = [(experiment.merged(decoder), [self._weights])]
        ((found,),) = self._ranker(jobs, progress=None, after_batch=after_batch)
        nll = found.nll_RxT.mean(axis=0, dtype=np.float64).min()  # at the best temperature
        by_title = config.metric.endswith(BY_TITLE)
        reported = experiment.config.evaluation.cutoffs
        cutoffs = sorted({k for k in (*reported, config.cutoff) if 0 < k <= self._ranker.beams})
        metrics = mean_metrics(hit_ranks(found, "title" if by_title else "item"), cutoffs)
        suffix = BY_TITLE if by_title else ""
        return {NLL: float(nll), **{f"{k}{suffix}": v for k, v in metrics.items()}}
