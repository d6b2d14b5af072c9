"""Rows of tokens: histories between the words of a prompt template, with or without a target.

A row is a lead and an item, again and again: what leads to the first item, to the first candidate
and to the target are texts of the template, to every other item it is the separator.

Axis letters: R rows, H history items, I items.
"""

import itertools
from typing import NamedTuple

import numpy as np

from tca4rec_jax.data.item_tokens import ItemTokens
from tca4rec_jax.data.ragged import Ragged, ranges
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.data.templates import TARGET, PromptTemplate, parse, reads_users
from tca4rec_jax.data.text_encoder import WholeTexts
from tca4rec_jax.errors import UserError

USER_SLOT = -2  # in place of an item: the placeholder carries the user's vector


class Prompts(NamedTuple):
    """R prompts.

    Attributes:
      tokens: int32 Ragged [R].
      slots: int32 Ragged [R], what the vectors of a row's placeholders are of, in their order: an
        item, or USER_SLOT.
    """

    tokens: Ragged
    slots: Ragged


class Rows(NamedTuple):
    """R rows of tokens.

    Attributes:
      prompts: their tokens and slots, targets included.
      starts: int64 Ragged [R], where each item, the target too, begins in its row.
    """

    prompts: Prompts
    starts: Ragged


def prompts(
    tokens: ItemTokens,
    history_RxH: np.ndarray,
    budget: int,
    candidates_RxN: np.ndarray | None = None,
) -> Prompts:
    """Prompts of the first template, of at most `budget` tokens: the latest items that fit.

    Histories are item indices, oldest first, padded on the left with PAD_ITEM. Candidates are shown
    if the template does so. Raises UserError for an empty history, or candidates that are missing.
    """
    inside = history_RxH != PAD_ITEM
    history = Ragged.from_lengths(history_RxH[inside], inside.sum(axis=1))
    if (history.lengths == 0).any():
        raise UserError(f"row {int(np.argmin(history.lengths))} has an empty history")
    none_R = np.full(len(history), len(tokens.written))  # in place of a target
    items, count = with_candidates(tokens, history, candidates_RxN, none_R)
    how = np.zeros(len(history), np.int64), count
    return row_tokens(tokens, keep_latest(tokens, items, budget, *how), *how).prompts


def with_candidates(
    tokens: ItemTokens, histories: Ragged, candidates_RxN: np.ndarray | None, target_R: np.ndarray
) -> tuple[Ragged, int]:
    """The items of rows, int [R], and N; 0 for prompts that do not show candidates."""
    targets = Ragged(target_R, np.arange(len(target_R) + 1))
    if tokens.between is None:
        return histories.followed_by(targets), 0
    if candidates_RxN is None:
        raise UserError(
            "prompt.templates show {candidates}, and there are none: evaluate with "
            "evaluation.candidates, or give candidates to Recommender.score"
        )
    count = candidates_RxN.shape[1]
    candidates = Ragged(candidates_RxN.ravel(), count * np.arange(len(target_R) + 1))
    return histories.followed_by(candidates).followed_by(targets), count


def keep_latest(
    tokens: ItemTokens, items: Ragged, budget: int, template_R: np.ndarray, candidates: int = 0
) -> Ragged:
    """Drops the oldest items of each history, whole, until the row's tokens fit `budget`.

    The rest is as in `row_tokens`. Raises UserError if the last item of a history and what follows
    do not fit.
    """
    lead_n, piece_n = _lead_and_piece(tokens, items, template_R, candidates)
    lengths = tokens.pieces.tokens.lengths
    lead_length_n, length_n = lengths[lead_n], lengths[piece_n]
    ends = np.concatenate([[0], np.cumsum(lead_length_n + length_n)])
    to_row_end_n = np.repeat(ends[items.offsets[1:]], items.lengths) - ends[:-1] - lead_length_n
    to_row_end_n += np.repeat(tokens.before.lengths[template_R], items.lengths)
    fits_n = to_row_end_n <= budget
    shortest_R = to_row_end_n[items.offsets[1:] - 2 - candidates]
    if shortest_R.size and shortest_R.max() > budget:
        row = int(np.argmax(shortest_R))
        raise UserError(
            f"row {row} needs {shortest_R[row]} tokens with one item in its history, the budget is "
            f"{budget}: raise prompt.max_tokens or shorten the titles (data.max_title_length)"
        )
    kept = np.add.reduceat(fits_n, items.offsets[:-1]) if fits_n.size else np.zeros(0, np.int64)
    return Ragged.from_lengths(items.values[fits_n], kept)


def row_tokens(
    tokens: ItemTokens, items: Ragged, template_R: np.ndarray, candidates: int = 0
) -> Rows:
    """Rows from the items of their histories, their candidates and, the last of each, their target.

    Args:
      items: int Ragged [R], each history of one at least; the target of a row without one is I.
      template_R: int, the prompt template of each row.
      candidates: how many each row has.
    """
    entries = np.stack(_lead_and_piece(tokens, items, template_R, candidates), axis=1).ravel()
    flat = tokens.pieces.tokens.take(entries)
    rows = Ragged(flat.values, flat.offsets[2 * items.offsets])
    starts = flat.offsets[1::2] - np.repeat(rows.offsets[:-1], items.lengths)
    placed = np.flatnonzero(flat.values == tokens.placeholder)
    carried = np.stack([np.full(items.values.size, USER_SLOT), items.values], axis=1).ravel()
    slots = carried[flat.row_of(placed)].astype(np.int32)
    slots_R = Ragged(slots, np.searchsorted(placed, rows.offsets))
    if tokens.whole is not None:
        rows, starts = _read_as_one(tokens, tokens.whole, entries, items.offsets)
    return Rows(Prompts(rows, slots_R), Ragged(starts, items.offsets))


def _read_as_one(
    tokens: ItemTokens, whole: WholeTexts, entries: np.ndarray, offsets: np.ndarray
) -> tuple[Ragged, np.ndarray]:
    """(rows of tokens, where each item begins) of rows whose prompts are tokenised as one text.

    `entries` are the pieces of all rows, two an item, the row r's from 2 * offsets[r] on. Of items
    in a history, which may have no tokens of their own, the beginning is -1.
    """
    made = [
        whole.tokens(entries[2 * start : 2 * stop - 1].tolist())
        for start, stop in itertools.pairwise(offsets)
    ]
    lengths = np.array(list(map(len, made)), np.int64)
    prompts = Ragged.from_lengths(np.array([*itertools.chain(*made)], np.int32), lengths)
    last = offsets[1:] - 1
    starts = np.full(offsets[-1], -1)
    starts[last] = lengths
    return prompts.followed_by(tokens.pieces.tokens.take(entries[2 * last + 1])), starts


def check_sequences(tokens: ItemTokens) -> None:
    """Raises UserError unless every item of a history may be a target (training.targets=all).

    The tokens after an item must not depend on whether it is shown or written, nor those before it
    on whether it is the last one.
    """
    pieces, count = tokens.pieces, len(tokens.shown)
    shown = tokens.shown.followed_by(pieces.tokens.take(np.full(count, pieces.separator)))
    long = bool((tokens.written.lengths > shown.lengths).any())
    start = ranges(shown.offsets[:-1], tokens.written.lengths)
    refuse_sequences(
        several=len(tokens.before) > 1,
        whole=tokens.whole is not None,
        candidates=tokens.between is not None,
        leads=not np.array_equal(tokens.after[0], tokens.separator),
        user=tokens.placeholder in tokens.before[0],
        written=long or not np.array_equal(shown.values[start], tokens.written.values),
    )


def check_sequence_texts(template: PromptTemplate) -> None:
    """`check_sequences` before anything is tokenised, as far as texts tell."""
    parts = ((text, f"{{{field}}}" * bool(field)) for text, field in template.target_parts)
    written = "".join(itertools.chain(*parts)) + template.end
    leads = dict((field, text) for text, field in parse(template.templates[0], "prompt.templates"))
    refuse_sequences(
        several=len(template.templates) > 1,
        whole=template.tokenised == "whole",
        candidates=template.shows_candidates,
        leads=template.bos_before_target or leads[TARGET] != template.separator,
        user=reads_users(template),
        written=not (template.item + template.separator).startswith(written),
    )


def refuse_sequences(
    *, several: bool, whole: bool, candidates: bool, leads: bool, user: bool, written: bool
) -> None:
    """Raises UserError for the first of the reasons against training.targets=all that holds."""
    reasons = {
        "prompt.templates has several": several,
        "prompt.tokenised is 'whole'": whole,
        "{candidates} are those of one target": candidates,
        "a template's text between {history} and {target} is not prompt.separator": leads,
        "{user} is a vector that knows all items of a row": user,
        "prompt.item and prompt.separator do not begin with prompt.target and prompt.end": written,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{reason}: set training.targets=last")


def _lead_and_piece(
    tokens: ItemTokens, items: Ragged, template_R: np.ndarray, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """What leads to every item and the item itself, as indices into `tokens.pieces`."""
    first, last = items.offsets[:-1], items.offsets[1:] - 1
    pieces = tokens.pieces
    lead_n = np.full(items.values.size, pieces.separator)
    lead_n[first] = pieces.before + template_R
    if candidates:
        lead_n[last - candidates] = pieces.between + template_R
    lead_n[last] = pieces.after + template_R
    piece_n = pieces.shown + items.values.astype(np.int64)
    piece_n[last] += pieces.written - pieces.shown
    return lead_n, piece_n
