"""Questions about an item: what a user chose, one more item, and an answer of two (TALLRec, CoLLM).

A question is the texts of a template, each before a field: lists of the history's items, the item
that is asked about, the answer. The answers are what is generated: ItemTokens.written has them in
the place of the items, first that for an item that the user likes.

Axis letters: R rows, F fields, n items of all histories, e entries of all rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tca4rec_jax.data.item_tokens import ItemTokens, TextEncoder, tokenise_items
from tca4rec_jax.data.prompts import USER_SLOT, Prompts, Rows
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.data.templates import (
    DISLIKED,
    HISTORY,
    ITEM,
    LIKED,
    USER,
    VECTOR,
    PromptTemplate,
    parse,
)
from tca4rec_jax.errors import UserError

YES, NO = 0, 1
"""The answers, as targets of rows."""


class Asked(NamedTuple):
    """The questions of R rows.

    Attributes:
      history: int32 Ragged [R], oldest first.
      liked: bool, aligned with its values; None if it is not known.
      item_R: int32, what is asked about.
      answer_R: int32, YES or NO.
    """

    history: Ragged
    liked: np.ndarray | None
    item_R: np.ndarray
    answer_R: np.ndarray

    def take(self, rows_B: np.ndarray) -> "Asked":
        """Some of the rows."""
        flat = Ragged(np.arange(self.history.values.size), self.history.offsets).take(rows_B)
        liked = None if self.liked is None else self.liked[flat.values]
        return Asked(self.history.take(rows_B), liked, self.item_R[rows_B], self.answer_R[rows_B])


def asked_of(sequences: ItemSequences, history_length: int, num_items: int, seed: int) -> Asked:
    """The questions of a split: does the user like the target of each row?

    With ratings the answer is theirs. Without, half of the rows, drawn from `seed`, ask about
    another item, one that is not in the row, and the answer is no. Rows of one item ask nothing and
    must be left out before.
    """
    last, counts = sequences.last_positions, np.minimum(sequences.lengths - 1, history_length)
    flat = ranges(last - counts, counts)
    history, item_R = Ragged.from_lengths(sequences.items[flat], counts), sequences.items[last]
    if sequences.liked is not None:
        answer_R = np.where(sequences.liked[last], YES, NO).astype(np.int32)
        return Asked(history, sequences.liked[flat], item_R, answer_R)
    rng = np.random.default_rng(seed)
    answer_R = rng.integers(0, 2, len(sequences)).astype(np.int32)
    no_R = answer_R == NO
    item_R = item_R.copy()
    item_R[no_R] = _other_items(sequences.take(no_R), num_items, rng)
    return Asked(history, None, item_R, answer_R)


def _other_items(sequences: ItemSequences, num_items: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [R]: for each row one of the items that it lacks, all of them equally likely."""
    row_n = sequences.row_of(np.arange(sequences.items.size))
    row_n, item_n = np.divmod(np.unique(row_n * num_items + sequences.items), num_items)
    count_R = np.bincount(row_n, minlength=len(sequences))
    nth_R = rng.integers(0, num_items - count_R)
    # An item of the row comes before the nth of the others if it has at most n others before it.
    others_n = item_n - (np.arange(item_n.size) - np.searchsorted(row_n, row_n))
    before_R = np.bincount(row_n[others_n <= nth_R[row_n]], minlength=len(sequences))
    return (nth_R + before_R).astype(np.int32)


def tokenise_questions(
    columns: Mapping[str, Sequence[str]],
    encoder: TextEncoder,
    template: PromptTemplate,
    answers: Sequence[str],
) -> ItemTokens:
    """The items, the texts of the one template that asks, and the answers.

    `before` has its first text, `after` the others. Raises UserError as `tokenise_items`, and for
    several templates, one that does not ask, or answers of which one begins the other.
    """
    first, *others = _texts(template)
    templates = tuple(f"{first}{{history}}{text}{{target}}" for text in others)
    items = tokenise_items(columns, encoder, dataclasses.replace(template, templates=templates))
    written = [encoder.inside(answer) for answer in answers]
    shortest = min(map(len, written))
    if not shortest or written[0][:shortest] == written[1][:shortest]:
        raise UserError(
            f"recommender.answers is {tuple(answers)!r}: this tokenizer makes one of them the "
            "beginning of the other, choose others"
        )
    lengths = np.array(list(map(len, written)))
    tokens = Ragged.from_lengths(np.concatenate(written).astype(np.int32), lengths)
    return dataclasses.replace(items, written=tokens, answers=tuple(answers))


def question_rows(
    tokens: ItemTokens, asked: Asked, template: PromptTemplate, *, with_answers: bool
) -> Rows:
    """The tokens of questions, with their answers or without; the latest items that fit.

    `starts` has where each answer begins. Raises UserError if a question does not fit
    template.max_tokens without a history, or a template wants ratings and there are none.
    """
    fields = _fields(template)
    asked = _keep_latest(tokens, asked, template.max_tokens)
    pieces, rows = tokens.pieces, np.arange(len(asked.item_R))
    nothing = pieces.written + len(tokens.written)
    entries: list[tuple] = []  # (row, field, place in the field, text before it, piece, item)
    for number, field in enumerate(fields):
        lead = pieces.before if number == 0 else pieces.after + number - 1
        if field in (HISTORY, LIKED, DISLIKED):
            row_n, item_n = _listed(asked, field)
            begins_n = np.diff(row_n, prepend=-1) > 0
            lead_n = np.where(begins_n, lead, pieces.separator)
            entries.append((row_n, number, np.arange(row_n.size), lead_n, item_n, item_n))
            none = np.setdiff1d(rows, row_n)
            entries.append((none, number, none, lead, nothing, asked.item_R[none]))
        elif field == ITEM:
            entries.append((rows, number, rows, lead, asked.item_R, asked.item_R))
        else:
            piece = pieces.written + asked.answer_R if with_answers else nothing
            entries.append((rows, number, rows, lead, piece, asked.item_R))
    table = np.concatenate([np.stack(np.broadcast_arrays(*one), axis=1) for one in entries])
    row_e, field_e, _, lead_e, piece_e, item_e = table[np.lexsort(table[:, 2::-1].T)].T
    flat = pieces.tokens.take(np.stack([lead_e, piece_e], axis=1).ravel())
    ends_R = np.searchsorted(row_e, rows, side="right")
    row_tokens = Ragged(flat.values, flat.offsets[2 * np.concatenate([[0], ends_R])])
    placed = np.flatnonzero(flat.values == tokens.placeholder)
    at = flat.row_of(placed)
    nth = np.arange(placed.size) - np.searchsorted(at, at)
    entry, in_text = at // 2, at % 2 == 0
    of_user = _of_users(template, len(fields))[field_e[entry], np.where(in_text, nth, 0)]
    of_text = np.where(of_user, USER_SLOT, asked.item_R[row_e[entry]])
    slots = np.where(in_text, of_text, item_e[entry]).astype(np.int32)
    prompts = Prompts(row_tokens, Ragged(slots, np.searchsorted(placed, row_tokens.offsets)))
    starts = flat.offsets[2 * ends_R - 1] - row_tokens.offsets[:-1]
    return Rows(prompts, Ragged(starts, np.arange(len(rows) + 1)))


def _listed(asked: Asked, field: str) -> tuple[np.ndarray, np.ndarray]:
    """(row, item) of the items of a list, int64 [n]."""
    history = asked.history
    row_n, item_n = history.row_of(np.arange(history.values.size)), history.values
    if field == HISTORY:
        return row_n, item_n
    if asked.liked is None:
        raise UserError(
            f"prompt.templates has {{{field}}}, but the data have no ratings: set "
            "data.rating_column, or show {history}"
        )
    wanted_n = asked.liked == (field == LIKED)
    return row_n[wanted_n], item_n[wanted_n]


def _keep_latest(tokens: ItemTokens, asked: Asked, budget: int) -> Asked:
    """Drops the oldest items of each history, whole, until every question fits."""
    shown, separator = tokens.shown.lengths, tokens.separator.size
    around = tokens.before.lengths[0] + tokens.after.values.size + tokens.written.lengths.max()
    room_R = budget - around - shown[asked.item_R]
    if (room_R < 0).any():
        row = int(np.argmax(room_R < 0))
        raise UserError(
            f"row {row} needs {budget - room_R[row]} tokens without a history, the budget is "
            f"{budget}: raise prompt.max_tokens or shorten the titles (data.max_title_length)"
        )
    history = asked.history
    ends_n = np.concatenate([[0], np.cumsum(shown[history.values] + separator)])
    to_end_n = np.repeat(ends_n[history.offsets[1:]], history.lengths) - ends_n[:-1]
    fits_n = to_end_n <= np.repeat(room_R, history.lengths)
    row_n = history.row_of(np.flatnonzero(fits_n))
    kept = Ragged.from_lengths(history.values[fits_n], np.bincount(row_n, minlength=len(history)))
    liked = None if asked.liked is None else asked.liked[fits_n]
    return asked._replace(history=kept, liked=liked)


def _template(template: PromptTemplate) -> str:
    text, *more = template.templates
    fields = [field for _, field in parse(text, "prompt.templates")]
    if more or ITEM not in fields:
        raise UserError(
            "recommender.name=answer asks about an item: expected one of prompt.templates, with "
            "{item} before {target}"
        )
    return text


def _fields(template: PromptTemplate) -> list[str]:
    """The fields that pieces of a row stand for."""
    carried = ("", USER, VECTOR)
    parts = parse(_template(template), "prompt.templates")
    return [field for _, field in parts if field not in carried]


def _texts(template: PromptTemplate) -> list[str]:
    """The text before each of the fields, as `parse` reads it; a placeholder is {user}."""
    texts = [""]
    for text, field in parse(_template(template), "prompt.templates"):
        texts[-1] += text.replace("{", "{{").replace("}", "}}")
        if field in (USER, VECTOR):
            texts[-1] += f"{{{USER}}}"
        elif field:
            texts.append("")
    return texts[:-1]


def _of_users(template: PromptTemplate, fields: int) -> np.ndarray:
    """bool [F, any]: whether a placeholder in the text before a field is the user's."""
    kinds: list[list[bool]] = [[]]
    for _, field in parse(_template(template), "prompt.templates"):
        if field in (USER, VECTOR):
            kinds[-1].append(field == USER)
        elif field:
            kinds.append([])
    most = max(1, *map(len, kinds))
    return np.array([[*one, *[False] * (most - len(one))] for one in kinds[:fields]])
