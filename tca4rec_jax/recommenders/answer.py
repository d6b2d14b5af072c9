"""The recommender that answers: will the user like this item? Yes or No (TALLRec, CoLLM).

What is generated is one of two answers: the trie has two leaves. Everything else is the generative
recommender's. Its settings beside that one's: `recommender.answers`, a template of `prompt` that
asks about {item}, `data.rating_column`, `training.targets=last`, `training.rows`.

The CF model's part is calibrated (Platt, 1999): its logit s of the item becomes the probability
sigmoid(a s + b) of the first answer, a and b fitted to the validation rows' answers.

Axis letters: R rows, m positions, I items.
"""

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.cf.logits_store import LogitsStore
from tca4rec_jax.config import build
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.core.decisions import title_decisions
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.questions import YES, Asked, asked_of, question_rows, tokenise_questions
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.tokenizer import text_encoder
from tca4rec_jax.recommenders.generative import GENERATIVE, prompt_template
from tca4rec_jax.training.examples import Examples, sampled

if TYPE_CHECKING:
    from tca4rec_jax.experiment import Experiment

_HELD_OUT = "validation"  # the split that calibrates
_NEWTON_STEPS = 50
_DECODING = {"find": "beams", "rules": "exact", "length_penalty": 0.0, "max_title_tokens": None}


def write_items(
    catalogue: Catalogue, tokenizer: PreTrainedTokenizerBase, config: ConfigDict
) -> ItemTokens:
    """The answers; items are shown only.

    Raises UserError as `tokenise_questions`, and for a search whose scores of the two answers are
    no log-probabilities, or that leaves out long titles.
    """
    for name, value in _DECODING.items():
        if config.decoding[name] != value:
            raise UserError(
                f"decoding.{name} is {config.decoding[name]!r}: recommender.name=answer compares "
                f"the probabilities of two answers, set decoding.{name}={value}"
            )
    template = prompt_template(tokenizer, config)
    encoder = text_encoder(tokenizer, template.bos, template.bos_token)
    answers = config.recommender.answers
    if template.tokenised == "whole" or template.bos_before_target:
        raise UserError(
            "recommender.name is 'answer': set prompt.tokenised=pieces and "
            "prompt.bos_before_target=false"
        )
    return tokenise_questions(catalogue.columns, encoder, template, answers)


def show_history(
    items: ItemTokens,
    history_RxH: np.ndarray,
    config: ConfigDict,
    candidates_RxN: np.ndarray | None = None,
) -> Prompts:
    """Raises UserError: a history alone is no question."""
    raise UserError(
        "recommender.name is 'answer', which says Yes or No to an item and lists none: give items "
        "to Recommender.score or launch/recommend.py --candidate, or take launch/evaluate.py"
    )


def build_examples(
    sequences: ItemSequences, items: ItemTokens, compressed: ItemTrie, config: ConfigDict
) -> Examples:
    """A question and its answer for every row, or training.rows of them.

    Raises UserError for other targets or tasks.
    """
    training, rounds = config.training, build(Objective, config.objective).rounds
    if training.targets != "last" or training.tasks or training.unsupervised_end or rounds:
        raise UserError(
            "recommender.name is 'answer': set training.targets=last, without training.tasks and "
            "training.unsupervised_end, and objective.cf_dtype=float32"
        )
    questions = Questions(sequences, len(items.shown), config)
    drawn = sampled(len(questions.sequences), training.rows, config.seed)
    asked, template = questions.asked.take(drawn), build(PromptTemplate, config.prompt)
    answer_R = asked.answer_R
    rows = question_rows(items, asked, template, with_answers=True)
    tokens, slots = rows.prompts
    length_R = items.written.lengths[answer_R]
    position = ranges(rows.starts.values - 1, length_R)
    label = tokens.values[np.repeat(tokens.offsets[:-1], length_R) + position + 1]
    return Examples(
        tokens=tokens,
        slots=slots,
        position=Ragged.from_lengths(position.astype(np.int32), length_R),
        label=Ragged.from_lengths(label, length_R),
        cf_position=Ragged(questions.position_R[drawn], np.arange(len(answer_R) + 1)),
        decisions=title_decisions(compressed).take(answer_R),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The questions of a split's rows; those of one item ask nothing."""

    split: ItemSequences
    num_items: int
    config: ConfigDict

    @cached_property
    def sequences(self) -> ItemSequences:
        """The R rows that ask."""
        return self.split.take(self.split.lengths > 1)

    @cached_property
    def position_R(self) -> np.ndarray:
        """int64, the flat position of each row's last item in the split."""
        return self.split.last_positions[self.split.lengths > 1]

    @cached_property
    def asked(self) -> Asked:
        """What they ask; without ratings drawn from data.seed, the same in every run."""
        data = self.config.data
        return asked_of(self.sequences, data.history_length, self.num_items, data.seed)

    def scores(self, store: LogitsStore, rows_B: np.ndarray) -> np.ndarray:
        """The CF logits of what some rows ask about: float64 [B]."""
        vectors = store.read(self.position_R[rows_B])
        return item_scores(vectors, self.asked.item_R[rows_B], store.cf_items)


def item_scores(vectors: np.ndarray, item_B: np.ndarray, items: CFItems) -> np.ndarray:
    """The CF logits of one item of each row: float64 [B], of what a CF model says of the rows.

    `vectors` are float [B, D], or logits [B, I] if the items are DENSE.
    """
    vectors = np.asarray(vectors, np.float64)
    if items.table_IxD is None:
        return vectors[np.arange(len(item_B)), item_B]
    scores_B = np.sum(vectors * np.asarray(items.table_IxD[item_B]), axis=1)
    return scores_B if items.bias_I is None else scores_B + np.asarray(items.bias_I[item_B])


def answer_logits(scores_m: np.ndarray, slope: float, offset: float) -> np.ndarray:
    """float32 [m, 2]: the calibrated logits of the answers, of CF logits of items."""
    calibrated_m = slope * scores_m + offset
    return np.stack([calibrated_m, np.zeros_like(calibrated_m)], axis=1).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerLogits:
    """The CF model's logits of the two answers, in the place of a store of items' logits."""

    store: LogitsStore
    questions: Questions
    slope: float
    offset: float
    cf_items = DENSE

    def read(self, positions_m: np.ndarray) -> np.ndarray:
        """float32 [m, 2]: of the answers after flat positions, those of rows' last items."""
        rows_m = np.searchsorted(self.questions.position_R, positions_m)
        return answer_logits(self.questions.scores(self.store, rows_m), self.slope, self.offset)


def teacher(experiment: "Experiment", split: str, store: LogitsStore) -> AnswerLogits:
    """The calibrated CF model. Raises UserError if all validation rows have one answer."""
    return AnswerLogits(store, _questions(experiment, split), *calibration(experiment))


def _questions(experiment: "Experiment", split: str) -> Questions:
    data = experiment.data
    return Questions(data.splits[split], data.catalogue.num_items, experiment.config)


def calibration(experiment: "Experiment") -> tuple[float, float]:
    """`calibrate` of the validation rows' answers. Raises as it, and as Experiment.cf_store."""
    held = held_out_questions(experiment)
    store = experiment.cf_store(_HELD_OUT, held.position_R)
    scores_R = held.scores(store, np.arange(len(held.position_R)))
    return calibrate(scores_R, held.asked.answer_R == YES)


def held_out_questions(experiment: "Experiment") -> Questions:
    """Those of the validation rows, to which CF models are calibrated."""
    return _questions(experiment, _HELD_OUT)


def calibrate(scores_R: np.ndarray, yes_R: np.ndarray) -> tuple[float, float]:
    """(a, b) of sigmoid(a score + b) that fit the answers best: logistic regression by Newton.

    As Platt, with targets (yes + 1) / (yes + 2) and 1 / (no + 2) in the place of 1 and 0, so that
    answers that scores tell apart have finite a and b. Raises UserError if there is one answer.
    """
    yes, no = int(yes_R.sum()), int((~yes_R).sum())
    if not yes or not no:
        raise UserError(
            "the validation rows have one answer only, to which no CF score can be calibrated: "
            "check data.liked_above"
        )
    centre, width = scores_R.mean(), scores_R.std() or 1.0
    inputs_Rx2 = np.stack([(scores_R - centre) / width, np.ones_like(scores_R)], axis=1)
    target_R = np.where(yes_R, (yes + 1) / (yes + 2), 1 / (no + 2))
    weights = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p_R = 1 / (1 + np.exp(-inputs_Rx2 @ weights))
        curvature = (inputs_Rx2 * (p_R * (1 - p_R))[:, None]).T @ inputs_Rx2 + 1e-9 * np.eye(2)
        weights -= np.linalg.solve(curvature, inputs_Rx2.T @ (p_R - target_R))
    slope = weights[0] / width
    return float(slope), float(weights[1] - slope * centre)


ANSWER = dataclasses.replace(
    GENERATIVE,
    write_items=write_items,
    show_history=show_history,
    build_examples=build_examples,
    teacher=teacher,
    teacher_reads=(_HELD_OUT,),
    evaluated_by="answers",
)
