"""Questions about candidates after new histories, of recommenders that answer Yes or No.

Axes: R histories, N candidates of each, B rows of a batch; a row asks about one candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

from tca4rec_jax.batching import map_batches
from tca4rec_jax.config import build
from tca4rec_jax.data.questions import YES, Asked, question_rows
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.data.templates import PromptTemplate, shows_ratings
from tca4rec_jax.decoding.engine import SearchRows
from tca4rec_jax.decoding.results import Recommendations
from tca4rec_jax.errors import UserError
from tca4rec_jax.recommenders.answer import (
    answer_logits,
    calibrate,
    held_out_questions,
    item_scores,
)
from tca4rec_jax.recommenders.vectors import soft_rows

if TYPE_CHECKING:
    from tca4rec_jax.decoding.recommender import CFModel
    from tca4rec_jax.experiment import Experiment

_ROWS = 1024  # validation rows whose CF logits are made at once


@dataclass(frozen=True, eq=False)
class CandidateQuestions:
    """Of an experiment whose recommender answers."""

    experiment: "Experiment"

    def rows(
        self,
        histories: Ragged,
        candidates_RxN: np.ndarray,
        liked: Sequence[Sequence[bool]] | None,
        cf: "CFModel | None",
        calibrated: tuple[float, float] | None = None,
    ) -> SearchRows:
        """The R * N rows of a search among the two answers, those of a history one after the other.

        `histories` are int32 items [R], `liked` which of them the user likes; None: all. With the
        CF model the rows have users' vectors, and where it is `calibrated` its logits of the
        answers. Raises UserError as `question_rows`, and for `liked` that does not fit.
        """
        experiment, (_, count) = self.experiment, candidates_RxN.shape
        item_of_row = candidates_RxN.ravel()
        history_of_row = np.repeat(np.arange(len(histories)), count)
        shown = experiment.config.data.history_length
        asked = (
            _latest(histories, self._liked(histories, liked), shown)
            .take(history_of_row)
            ._replace(item_R=item_of_row)
        )
        template = build(PromptTemplate, experiment.config.prompt)
        prompts = question_rows(experiment.items, asked, template, with_answers=False).prompts
        if cf is None:
            return SearchRows(prompts.tokens, soft=soft_rows(experiment, prompts))

        def vectors(rows_B: np.ndarray) -> jax.Array:
            history_BxS = histories.latest(history_of_row[rows_B], cf.history_length, fill=PAD_ITEM)
            return cf.vectors(history_BxS)

        def logits(rows_B: np.ndarray) -> np.ndarray:
            assert calibrated is not None
            scores_B = item_scores(np.asarray(vectors(rows_B)), item_of_row[rows_B], cf.items)
            return answer_logits(scores_B, *calibrated)

        soft = soft_rows(experiment, prompts, vectors, cf.items)
        return SearchRows(prompts.tokens, cf=logits if calibrated else None, soft=soft)

    def log_odds(self, found: Recommendations) -> np.ndarray:
        """float32 [rows]: `log_odds` of a search among the answers."""
        return log_odds(found, self.experiment.trie.leaf_of_item[YES])

    def calibration(self, cf: "CFModel") -> tuple[float, float]:
        """`calibrate` of the validation rows' answers by what this CF model itself says of them.

        A store of logits may be another model's, or hold but the best of each row. Raises
        UserError if the validation rows have one answer only.
        """
        held = held_out_questions(self.experiment)
        history_RxS, _ = held.sequences.histories_and_targets(cf.history_length)

        def scores(history_bxS: np.ndarray, item_b: np.ndarray) -> np.ndarray:
            return item_scores(np.asarray(cf.vectors(history_bxS)), item_b, cf.items)

        scores_R = map_batches(scores, history_RxS, held.asked.item_R, batch_size=_ROWS)
        return calibrate(scores_R, held.asked.answer_R == YES)

    def _liked(self, histories: Ragged, liked: Sequence[Sequence[bool]] | None) -> np.ndarray:
        """bool, aligned with the histories' values."""
        if liked is None:
            return np.ones(histories.values.size, bool)
        if not shows_ratings(self.experiment.config.prompt):
            raise UserError("liked goes with {liked} in prompt.templates, which have none: omit it")
        fit = len(liked) == len(histories) and not any(map(np.isscalar, liked))
        if not fit or [*map(len, liked)] != histories.lengths.tolist():
            raise UserError("liked: expected a truth value for every item of every history")
        return np.concatenate([np.asarray(one, bool) for one in liked])


def _latest(histories: Ragged, liked: np.ndarray, history_length: int) -> Asked:
    """Of the latest items of each history; what is asked about, and the answer, is left open."""
    counts_R = np.minimum(histories.lengths, history_length)
    flat, none_R = ranges(histories.offsets[1:] - counts_R, counts_R), np.zeros_like(counts_R)
    shown = Ragged.from_lengths(histories.values[flat], counts_R)
    return Asked(shown, liked[flat], item_R=none_R, answer_R=none_R)


def log_odds(found: Recommendations, yes_leaf: int) -> np.ndarray:
    """float32 [R]: log P(yes) - log P(no) of a search that has found both answers."""
    is_yes_RxM = found.leaves_RxM == yes_leaf
    yes_R, no_R = (
        np.max(found.scores_RxM, axis=1, where=chosen_RxM, initial=-np.inf)
        for chosen_RxM in (is_yes_RxM, ~is_yes_RxM)
    )
    return yes_R - no_R
