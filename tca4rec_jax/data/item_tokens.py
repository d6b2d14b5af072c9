"""The catalogue and the prompt templates as token ids.

Every piece of a prompt (the text before a history, an item, a separator, the text after the
history) is tokenised on its own and the ids are concatenated, so an item has the same tokens
wherever it stands, and the trie holds exactly what the model is asked to generate.

Axis letters: I items, T templates.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import (
    CANDIDATES,
    HISTORY,
    TARGET,
    USER,
    VECTOR,
    Parts,
    PromptTemplate,
    carried_vectors,
    check_fields_of,
    parse,
)
from tca4rec_jax.data.text_encoder import TextEncoder, WholeTexts, encode, filled
from tca4rec_jax.errors import ItemError, UserError

_PLACEHOLDER = "prompt.placeholder"
_RESERVED = re.compile("reserved|unused|extra")  # control tokens that are there to be given a use


class Pieces(NamedTuple):
    """Everything that rows are made of, and which pieces are the first of their kind.

    A row without a target has none of the item I, the last piece of the kind `written`.
    """

    tokens: Ragged
    shown: int
    written: int
    before: int
    between: int
    after: int
    separator: int


class Task(NamedTuple):
    """A text about every item, the last of whose fields is to be generated.

    Attributes:
      asked: int32 Ragged [I], from its beginning to that field.
      answered: int32 Ragged [I], the field and what follows it.
    """

    asked: Ragged
    answered: Ragged


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """The tokenised items and prompt templates.

    Attributes:
      written: int32 Ragged [I], an item as it is generated, its end included.
      shown: int32 Ragged [I], an item of a history.
      before, after: int32 Ragged [T], the text before the history and that before the target.
      separator: int32 [any], between two items of a history.
      placeholder: the token that carries vectors, if prompts have it; `written` never has it.
      tasks: what is trained on beside histories.
      between: int32 Ragged [T], the text before the candidates, if prompts have them.
      answers: what `written` has in the place of items, if it has.
      whole: makes the tokens of prompts, if they are not those of their pieces.
    """

    written: Ragged
    shown: Ragged
    before: Ragged
    after: Ragged
    separator: np.ndarray
    placeholder: int | None = None
    tasks: Sequence[Task] = ()
    between: Ragged | None = None
    answers: Sequence[str] = ()
    whole: WholeTexts | None = None

    @cached_property
    def pieces(self) -> Pieces:
        """Of the rows of prompts.py."""
        nothing, separator = (
            Ragged.from_lengths(ids, np.array([ids.size]))
            for ids in (self.separator[:0], self.separator)
        )
        between = nothing if self.between is None else self.between
        kinds = (self.shown, self.written, nothing, self.before, between, self.after, separator)
        shown, written, _, *around = np.cumsum([0, *map(len, kinds[:-1])]).tolist()
        return Pieces(Ragged.stack(kinds), shown, written, *around)


def tokenise_items(
    columns: Mapping[str, Sequence[str]],
    encoder: TextEncoder,
    template: PromptTemplate,
    tasks: Sequence[str] = (),
) -> ItemTokens:
    """Tokenises a catalogue once, for histories, targets and the trie alike.

    `columns` has the texts of the I items, by the field of a template that shows them; `tasks` are
    texts with such fields.

    Raises UserError for a field that is not in `columns` or is empty for an item, an end or a
    placeholder that is not one token, and an item that has no tokens or contains a control token,
    its end or the placeholder.
    """
    shown, written = template.item_parts, template.target_parts
    check_fields_of(shown, (*columns, VECTOR), "prompt.item")
    check_fields_of(written, tuple(columns), "prompt.target")
    end = one_token(template.end, "prompt.end", encoder) if template.end else None
    placeholder = _placeholder(encoder, template) if carried_vectors(template) else None
    # Items are shown mostly as they are written.
    cached = encoder._replace(inside=cache(encoder.inside), first=cache(encoder.first))
    of = _Tokeniser(columns, cached, placeholder)

    def task(text: str) -> Task:
        parts = parse(text, "training.tasks")
        if any(field == HISTORY for _, field in parts):
            raise UserError(
                "training.tasks has {history}: a task is about one item and no user; give texts "
                "around a history in prompt.templates, of which training draws one for every row"
            )
        check_fields_of(parts, tuple(columns), "training.tasks")
        asked, answered = _question(parts)
        ask, answer = (partial(of.items, one, "training.tasks") for one in (asked, answered))
        return Task(ask(begin=True), answer())

    around = [_around(text) for text in template.templates]
    between = [of.words(texts[0]) for _, *texts, _ in around if texts]
    bos, whole = _bos_before_target(template, encoder), template.tokenised == "whole"
    return ItemTokens(
        written=of.items(written, "prompt.target" if template.target else "prompt.item", end),
        shown=of.items(shown, "prompt.item"),
        before=_ragged([of.words(before, begin=True) for before, *_ in around]),
        after=_ragged([[*of.words(after), *bos] for *_, after in around]),
        separator=np.array(of.words([(template.separator, "")]), np.int32),
        placeholder=placeholder,
        tasks=[task(text) for text in tasks],
        between=_ragged(between) if between else None,
        whole=WholeTexts(encoder, of.texts(template, around, bos)) if whole else None,
    )


def _bos_before_target(template: PromptTemplate, encoder: TextEncoder) -> list[int]:
    """The tokens between a template's last text and the target."""
    if not template.bos_before_target:
        return []
    if encoder.bos is None:
        raise UserError(
            "prompt.bos_before_target is true, but the tokenizer has no BOS token: name the text "
            "of one in prompt.bos_token"
        )
    return [encoder.bos]


class _Tokeniser(NamedTuple):
    """Makes tokens of a template's parts; `begin`: they begin a prompt."""

    columns: Mapping[str, Sequence[str]]
    encoder: TextEncoder
    placeholder: int | None

    def words(self, parts: Parts, *, begin: bool = False) -> list[int]:
        """Of parts that show no item."""
        forbidden = {self.placeholder: _PLACEHOLDER}
        return self._tokens(self._segments(parts), ("the prompt",), {}, forbidden, begin)

    def items(
        self, parts: Parts, name: str, end: int | None = None, *, begin: bool = False
    ) -> Ragged:
        """int32 [I], of every item, its end included; `name` is the field that has the parts."""
        forbidden = {token: text for text, token in self.encoder.control.items()}
        forbidden |= {} if end is None else {end: "prompt.end"}
        forbidden |= {} if self.placeholder is None else {self.placeholder: _PLACEHOLDER}
        for field, texts in (used := self._used(parts)).items():
            empty = next((item for item, text in enumerate(texts) if not text.strip()), None)
            if empty is not None:
                why = f" has no {field}, which {name} shows: give it one, drop the item, or leave "
                raise ItemError("item ", empty, why, f"{{{field}}} out")
        rows, segments = [], self._segments(parts)
        for item, fields in enumerate(self._rows_of(used)):
            ids = self._tokens(segments, ("item ", item), fields, forbidden, begin)
            if not ids:
                raise ItemError("item ", item, f": this tokenizer makes no tokens of {fields}")
            rows.append(ids if end is None else [*ids, end])
        return _ragged(rows)

    def texts(
        self, template: PromptTemplate, around: Sequence[Sequence[Parts]], bos: list[int]
    ) -> list[list[int | str]]:
        """Of the pieces; `around` are those before, between and after of each template, `bos` what
        follows the last."""
        shown = self._segments(template.item_parts)
        fields_I = self._rows_of(self._used(template.item_parts))
        of_items = [filled(shown, fields) for fields in fields_I]

        def words(parts: Parts, after: Sequence[int] = ()) -> list[int | str]:
            return [*filled(self._segments(parts), {}), *after]

        written: list[list[int | str]] = [[] for _ in range(len(of_items) + 1)]
        befores = [words(before) for before, *_ in around]
        betweens = [words(texts[0]) for _, *texts, _ in around if texts] or [[]]
        afters = [words(after, bos) for *_, after in around]
        separator = words([(template.separator, "")])
        return [*of_items, *written, *befores, *betweens, *afters, separator]

    def _used(self, parts: Parts) -> dict[str, Sequence[str]]:
        """The columns that parts show."""
        return {field: self.columns[field] for _, field in parts if field in self.columns}

    def _rows_of(self, used: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
        """The texts of each item by their field: none of an item shown by its vector alone."""
        for item in range(len(next(iter(self.columns.values())))):
            yield {field: texts[item] for field, texts in used.items()}

    def _segments(self, parts: Parts) -> list[int | Parts]:
        """Texts with fields, and the tokens between them: control tokens and placeholders."""
        segments: list[int | Parts] = []
        texts: Parts = []
        names = sorted(self.encoder.control, key=len, reverse=True)
        pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        for text, field in parts:
            for at, piece in enumerate(pattern.split(text) if pattern else [text]):
                if at % 2:
                    segments += [texts, self.encoder.control[piece]]
                    texts = []
                else:
                    texts.append((piece, ""))
            if field in (VECTOR, USER) and self.placeholder is not None:
                segments += [texts, self.placeholder]
                texts = []
            else:
                texts.append(("", field))
        return [*segments, texts]

    def _tokens(self, segments, where, fields, forbidden, begin: bool) -> list[int]:
        """The tokens of segments, whose fields have these texts; `where` are parts of an error."""

        def check(text: str, found: list[int]) -> None:
            if bad := forbidden.keys() & found:
                why = f": {text!r} contains {forbidden[min(bad)]} as this tokenizer reads it"
                raise ItemError(*where, why, ": change it")

        return encode(filled(segments, fields), self.encoder, begin=begin, check=check)


def one_token(text: str, name: str, encoder: TextEncoder) -> int:
    """The token of a text, or of a control token's. Raises UserError, naming the field, if none."""
    control = encoder.control
    ids = [control[text]] if text in control else encoder.inside(text)
    if len(ids) != 1:
        known = f" or a control token ({', '.join([*control][:3])} ..)" if control else ""
        raise UserError(
            f"{name} {text!r} is {len(ids)} tokens of this tokenizer: choose a text of one token, "
            f"such as a line break{known}"
        )
    return ids[0]


def check_vocabulary(tokens: ItemTokens, item_ids: Sequence[str], vocab_size: int) -> None:
    """Raises UserError for a token that the LLM does not have.

    It names the item, the answer, or the prompt that has it.
    """
    placeholder = [] if tokens.placeholder is None else [tokens.placeholder]
    texts = [one.values for one in (tokens.before, tokens.between, tokens.after) if one is not None]
    words = [*texts, tokens.separator, np.array(placeholder, int)]
    prompt = Ragged.from_lengths(np.concatenate(words), np.array([sum(map(len, words))]))
    names = {"item": item_ids, "the answer": tokens.answers}
    of_items = [tokens.shown, *(part for task in tokens.tasks for part in task)]
    checked = [("the answer" if tokens.answers else "item", tokens.written)]
    checked += [*(("item", part) for part in of_items), ("the prompt", prompt)]
    for kind, ragged in checked:
        beyond = np.flatnonzero(ragged.values >= vocab_size)
        if beyond.size:
            at = int(beyond[0])
            where = f"{kind} {names[kind][int(ragged.row_of(at))]!r}" if kind in names else kind
            raise UserError(
                f"{where} has token {ragged.values[at]}, but the LLM's vocabulary is {vocab_size} "
                "tokens: its tokenizer and its weights do not belong together"
            )


def _around(template: str) -> list[Parts]:
    """The parts of a template before its history, its candidates if it has them, and its target."""
    texts: list[Parts] = [[]]
    for text, field in parse(template, "prompt.templates"):
        if field in (HISTORY, CANDIDATES, TARGET):
            texts[-1].append((text, ""))
            texts.append([])
        else:
            texts[-1].append((text, field))
    return texts[:-1]


def _question(parts: Parts) -> tuple[Parts, Parts]:
    """The parts of a task before its last field, and the rest; a space before it is the rest's.

    Raises UserError for a task without two fields.
    """
    fields = [at for at, (_, field) in enumerate(parts) if field]
    if len(fields) < 2:
        raise UserError(
            "training.tasks: expected two fields of an item in each, such as '{title} is{id}'"
        )
    last = fields[-1]
    text, field = parts[last]
    asked = text.rstrip()
    return [*parts[:last], (asked, "")], [(text[len(asked) :], field), *parts[last + 1 :]]


def _placeholder(encoder: TextEncoder, template: PromptTemplate) -> int:
    """The token that carries vectors."""
    if template.placeholder:
        return one_token(template.placeholder, _PLACEHOLDER, encoder)
    words = "".join((*template.templates, template.item, template.separator, template.end))
    spare = [text for text in encoder.spare if text not in words]
    if not spare:
        raise UserError(
            "the tokenizer reserves no control token for the vectors of a prompt: name in "
            "prompt.placeholder a text of one token that no title has"
        )
    reserved = [text for text in spare if _RESERVED.search(text)]
    return encoder.control[(reserved or spare)[-1]]


def _ragged(rows: list[list[int]]) -> Ragged:
    values = np.concatenate([np.asarray(ids, np.int32) for ids in rows])
    return Ragged.from_lengths(values, np.array(list(map(len, rows))))
