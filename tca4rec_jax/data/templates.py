"""Prompt templates: texts with fields in braces, as `str.format` writes them.

A prompt is one of `templates` around a history; docs/data.md describes the fields.
"""

from dataclasses import dataclass
from string import Formatter
from typing import Annotated, Any, Literal

from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, Range, Text, Texts

HISTORY, CANDIDATES, TARGET, USER = "history", "candidates", "target", "user"
LIKED, DISLIKED, ITEM = "liked", "disliked", "item"  # of a template that asks about an item
VECTOR, ID = "vector", "id"
ITEM_FIELDS = ("title", ID, VECTOR)  # beside the attributes, whose names these cannot be

# A template's parts: a text and the field after it, '' after the last text.
Parts = list[tuple[str, str]]


@dataclass(frozen=True)
class PromptTemplate:
    """The words around the items, how an item is written, and how long a prompt may be.

    Attributes:
      templates: each a text with {history} and, at its end, {target}; {candidates} between them
        are items of which the target is one; {user} is a token that carries the user's CF vector.
        Training draws one of several for every row, lists take the first. One that asks about an
        item (recommender.name=answer) has {item} before {target}, shown as in a history, may have
        {liked} and {disliked} for {history}, and {vector} for the item's CF vector.
      item: how an item is shown in a history: {title}, any of data.attributes as {brand}, {id}
        for its semantic id, {vector} for a token that carries its CF vector.
      separator: between two items of a history, or two candidates.
      candidates: how many {candidates} training shows: the target and items outside the history,
        drawn for every row; inference shows those of evaluation.candidates.
      target: how an item is generated; by default as `item` without {vector}.
      end: after a target, a text of one token, such as a line break or the text of a control
        token; it ends the item in the trie. '' for none: then no item may begin another.
      placeholder: the text of the token that carries vectors, which nothing else may contain; by
        default a control token that the tokenizer reserves.
      chat: put a template into the chat template of the LLM's tokenizer: what precedes {target} is
        the user's message, the target the answer; `end` is then the end of an answer, such as
        <|im_end|>.
      bos: whether a prompt begins with the tokenizer's BOS token: 'added' where the tokenizer adds
        it to a text, 'known' wherever it has one, 'never'.
      bos_token: the text of the token that is BOS; by default the tokenizer's.
      bos_before_target: whether BOS stands before the target, too.
      tokenised: a prompt becomes tokens in 'pieces', each item and each text around them on its
        own, or as a 'whole', where the tokens of an item may depend on what stands beside it. The
        target is always on its own.
      max_tokens: of a prompt; the latest items that fit are kept.

    Raises UserError for a template without these fields, in another order, or with others.
    """

    templates: Texts = ("{history}\n{target}",)
    item: Text = " {title}"
    separator: str = "\n"
    candidates: Annotated[int, Range("at least 2", lambda n: n >= 2)] | None = None
    target: str = ""
    end: str = "\n"
    placeholder: str = ""
    chat: bool = False
    bos: Literal["added", "known", "never"] = "added"
    bos_token: str = ""
    bos_before_target: bool = False
    tokenised: Literal["pieces", "whole"] = "pieces"
    max_tokens: Count = 256

    def __post_init__(self):
        for text in self.templates:
            parts = parse(text, "prompt.templates")
            known: tuple[str, ...] = (HISTORY, CANDIDATES, TARGET, USER)
            if asks(text):
                known = (HISTORY, LIKED, DISLIKED, ITEM, TARGET, USER, VECTOR)
            check_fields_of(parts, known, "prompt.templates")
            fields = [field for _, field in parts if field not in ("", USER, VECTOR)]
            at_end = parts[-1][1] == TARGET
            expected = [field for field in known[:3] if field != CANDIDATES or field in fields]
            if asks(text):
                _check_question(text, fields if at_end else [])
            elif fields != expected or not at_end:
                raise UserError(
                    f"prompt.templates has {text!r}: expected {{history}} once, then {{target}} "
                    "once, at its end; {candidates} may stand once between them"
                )
        if len({f"{{{CANDIDATES}}}" in text for text in self.templates}) > 1:
            raise UserError("prompt.templates: expected {candidates} in all of them or in none")
        if self.shows_candidates != (self.candidates is not None):
            raise UserError(
                "prompt.candidates goes with {candidates} in prompt.templates: give both or none"
            )
        if not any(field for _, field in self.item_parts):
            raise UserError(f"prompt.item has {self.item!r}: expected a field, such as {{title}}")
        if not any(field for _, field in self.target_parts):
            raise UserError(
                f"prompt.target, by default prompt.item without {{vector}}, is {self.target!r}: "
                "expected a field, such as {title}"
            )
        if any(field == VECTOR for _, field in parse(self.target, "prompt.target")):
            raise UserError("prompt.target has {vector}: only items of a history carry vectors")

    @property
    def shows_candidates(self) -> bool:
        """Whether prompts list candidates."""
        return f"{{{CANDIDATES}}}" in self.templates[0]

    @property
    def item_parts(self) -> Parts:
        """Of an item in a history."""
        return parse(self.item, "prompt.item")

    @property
    def target_parts(self) -> Parts:
        """Of an item that is generated, without its end."""
        if self.target:
            return parse(self.target, "prompt.target")
        return parse(self.item.replace(f"{{{VECTOR}}}", "").rstrip(), "prompt.item")


def asks(text: str) -> bool:
    """Whether a template asks about an item."""
    return ITEM in (field for _, field in parse(text, "prompt.templates"))


def _check_question(text: str, fields: list[str]) -> None:
    *lists, item, target = fields if len(fields) > 2 else ["", "", ""]
    known = {HISTORY}, {LIKED, DISLIKED}, {LIKED}
    if (item, target) != (ITEM, TARGET) or {*lists} not in known or len({*lists}) < len(lists):
        raise UserError(
            f"prompt.templates has {text!r}: expected {{history}}, or {{liked}} and perhaps "
            "{disliked}, then {item} once and {target} once, at its end"
        )


def shows_ratings(template: Any) -> bool:
    """Whether prompts list items by their rating; `template` is as of `carried_vectors`."""
    texts = template.templates
    return any(field in (LIKED, DISLIKED) for text in texts for _, field in parse(text, "prompt"))


def carried_vectors(template: Any) -> set[str]:
    """Whose vectors prompts carry: VECTOR for those of items, USER for those of users.

    Of a PromptTemplate, or the section of a config that it is built from.
    """
    texts = (*template.templates, template.item)
    return {field for text in texts for _, field in parse(text, "prompt")} & {USER, VECTOR}


def reads_users(template: Any) -> bool:
    """Whether prompts carry the user's vector; `template` is as of `carried_vectors`."""
    return USER in carried_vectors(template)


def shows_ids(template: Any) -> bool:
    """Whether prompts have the items' semantic ids; `template` is as of `carried_vectors`."""
    texts = template.item, template.target
    return any(field == ID for text in texts for _, field in parse(text, "prompt"))


def parse(text: str, where: str) -> Parts:
    """The parts of a text. Raises UserError, naming the field `where`, for braces that are none."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{where} has {text!r}: {error}; write a brace as {{{{ or }}}}") from error
    for _, field, form, conversion in parts:
        if field == "" or form or conversion:
            raise UserError(f"{where} has {text!r}: expected the name of a field alone in braces")
    return [(literal, field or "") for literal, field, _, _ in parts]


def check_fields_of(parts: Parts, known: tuple[str, ...], where: str) -> None:
    """Raises UserError for a field that is not known, and names those that are."""
    for _, field in parts:
        if field and field not in known:
            names = ", ".join(f"{{{name}}}" for name in known)
            hint = "" if where == "prompt.templates" else "; data.attributes names others"
            raise UserError(f"{where} has {{{field}}}: the fields known there are {names}{hint}")
