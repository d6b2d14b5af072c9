"""Histories and titles as token ids.

A prompt is `prefix`, then one piece per title: `before_title`, the title, `end`. Every piece is
tokenised on its own and the ids are concatenated, so a title has the same tokens inside a history
and as the target, and the trie holds exactly what the model is asked to generate.

Axis letter: H history items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, Text


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the titles, and how long a prompt may be.

    Attributes:
      prefix: before the first title.
      before_title: before every title, tokenised with it.
      end: after every title, a single token or the text of a control token; it ends the title in
        the trie.
      bos: whether a prompt begins with the tokenizer's BOS token: 'added' where the tokenizer adds
        it to a text, 'known' wherever it has one, 'never'.
      max_tokens: of a prompt; the latest titles that fit are kept.
    """

    prefix: str = ""
    before_title: str = " "
    end: Text = "\n"
    bos: Literal["added", "known", "never"] = "added"
    max_tokens: Count = 256


class TextEncoder(NamedTuple):
    """How a tokenizer makes ids of the texts of a prompt.

    Attributes:
      inside: of a text that follows other text.
      first: of a text that begins a prompt, with the BOS token if prompts have one.
      control: the ids of control tokens, by their text.
    """

    inside: Callable[[str], list[int]]
    first: Callable[[str], list[int]]
    control: Mapping[str, int] = {}


@dataclass(frozen=True, eq=False)
class TitleTokens:
    """The tokenised catalogue.

    Attributes:
      prefix: int32 [any], tokens before the first title (may be empty).
      titles: int32 Ragged [I], every title's tokens, the end token included.
    """

    prefix: np.ndarray
    titles: Ragged


def tokenise_titles(
    titles: Sequence[str], encoder: TextEncoder, template: PromptTemplate
) -> TitleTokens:
    """Tokenises a catalogue's titles once, for histories, targets and the trie alike.

    Raises UserError if `end` is not one token, or a title contains it or a control token, or has no
    tokens.
    """
    control = encoder.control
    end = [control[template.end]] if template.end in control else encoder.inside(template.end)
    if len(end) != 1:
        known = f" or a control token ({', '.join([*control][:3])} ..)" if control else ""
        raise UserError(
            f"prompt.end {template.end!r} is {len(end)} tokens of this tokenizer: choose a text of "
            f"one token, such as a line break{known}"
        )
    reserved = {token: text for text, token in control.items()} | {end[0]: "prompt.end"}
    encoded = [encoder.inside(template.before_title + title) for title in titles]
    for item, ids in enumerate(encoded):
        if not titles[item].strip() or not ids:
            raise UserError(f"item {item} has an empty title; give it one or drop it")
        if found := reserved.keys() & ids:
            raise UserError(
                f"item {item}: its title {titles[item]!r} contains {reserved[min(found)]} as this "
                "tokenizer reads it: change the title"
            )
    values = np.concatenate([np.asarray(ids + end, np.int32) for ids in encoded])
    lengths = np.array([len(ids) + 1 for ids in encoded])
    prefix = np.asarray(encoder.first(template.prefix), np.int32)
    return TitleTokens(prefix, Ragged.from_lengths(values, lengths))


def check_vocabulary(tokens: TitleTokens, item_ids: Sequence[str], vocab_size: int) -> None:
    """Raises UserError naming an item, or the prompt, with a token that the LLM does not have."""
    values = np.concatenate([tokens.titles.values, tokens.prefix])
    beyond = np.flatnonzero(values >= vocab_size)
    if beyond.size:
        at = int(beyond[0])
        item = int(tokens.titles.row_of(at))
        where = f"item {item_ids[item]!r}" if item < len(item_ids) else "prompt.prefix"
        raise UserError(
            f"{where} has token {values[at]}, but the LLM's vocabulary is {vocab_size} tokens: its "
            "tokenizer and its weights do not belong together"
        )


def row_tokens(tokens: TitleTokens, items: Ragged) -> tuple[Ragged, Ragged]:
    """Prefix and titles of each row's items, int32 [R]; and where each title begins in its row.

    The latter is int64, aligned with `items`.
    """
    titles, size = tokens.titles.take(items.values), tokens.prefix.size
    rows = Ragged(titles.values, titles.offsets[items.offsets])
    starts = titles.offsets[:-1] - np.repeat(rows.offsets[:-1], items.lengths) + size
    prefixes = Ragged(np.tile(tokens.prefix, len(items)), size * np.arange(len(items) + 1))
    return prefixes.followed_by(rows), Ragged(starts, items.offsets)


def keep_latest(tokens: TitleTokens, items: Ragged, budget: int, reserve: int = 0) -> Ragged:
    """Drops the oldest items of each row, whole, until prefix and titles fit `budget` tokens.

    Raises UserError if the prefix and the last `reserve` items (at least one) do not fit.
    """
    ends = np.concatenate([[0], np.cumsum(tokens.titles.lengths[items.values])])
    to_row_end = np.repeat(ends[items.offsets[1:]], items.lengths) - ends[:-1]
    fits = to_row_end + tokens.prefix.size <= budget
    first_to_stay = np.repeat(items.offsets[1:], items.lengths) - max(reserve, 1)
    lost = np.flatnonzero(~fits & (np.arange(fits.size) >= first_to_stay))
    if lost.size:
        raise UserError(
            f"row {items.row_of(lost[0])} needs {to_row_end[lost[0]] + tokens.prefix.size} tokens "
            f"for the prompt prefix and its last {max(reserve, 1)} titles, the budget is {budget}: "
            "raise prompt.max_tokens or shorten the titles (data.max_title_length)"
        )
    kept = np.add.reduceat(fits, items.offsets[:-1]) if fits.size else np.zeros(0, np.int64)
    return Ragged.from_lengths(items.values[fits], kept)


def prompts(tokens: TitleTokens, history_RxH: np.ndarray, budget: int) -> Ragged:
    """int32 Ragged [R]: prompts of at most `budget` tokens, cut at the left by whole titles.

    Histories are item indices, oldest first, padded on the left with PAD_ITEM; UserError if empty.
    """
    inside = history_RxH != PAD_ITEM
    items = Ragged.from_lengths(history_RxH[inside], inside.sum(axis=1))
    if (items.lengths == 0).any():
        raise UserError(f"row {int(np.argmin(items.lengths))} has an empty history")
    return row_tokens(tokens, keep_latest(tokens, items, budget))[0]
