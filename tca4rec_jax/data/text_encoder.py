"""Tokens of texts: what a tokenizer does for prompts, and texts with tokens between them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tca4rec_jax.data.templates import Parts


class TextEncoder(NamedTuple):
    """How a tokenizer makes ids of the texts of a prompt.

    Attributes:
      inside: of a text that follows other text.
      first: of a text that begins a prompt, with the BOS token if prompts have one.
      control: the ids of control tokens, by their text.
      spare: those of them that have no role, such as BOS or padding.
      bos: the BOS token, if there is one.
    """

    inside: Callable[[str], list[int]]
    first: Callable[[str], list[int]]
    control: Mapping[str, int] = {}
    spare: Sequence[str] = ()
    bos: int | None = None


def filled(segments: Sequence[int | Parts], fields: Mapping[str, str]) -> list[int | str]:
    """The texts of segments whose fields have these texts, and the tokens between them."""
    return [
        segment
        if isinstance(segment, int)
        else "".join(text + fields.get(field, "") for text, field in segment)
        for segment in segments
    ]


def encode(
    texts: Sequence[int | str],
    encoder: TextEncoder,
    *,
    begin: bool,
    check: Callable[[str, list[int]], None] = lambda text, ids: None,
) -> list[int]:
    """Tokens of texts with tokens between them; `begin`: they begin a prompt.

    `check` is called with every text and its tokens, without BOS.
    """
    ids: list[int] = []
    for at, text in enumerate(texts):
        if isinstance(text, int):
            ids.append(text)
            continue
        of_text = encoder.first if begin and at == 0 else encoder.inside
        found = of_text(text)
        check(text, found[len(of_text("")) :])
        ids += found
    return ids


class WholeTexts(NamedTuple):
    """Makes tokens of several pieces that are read as one text (prompt.tokenised='whole').

    Attributes:
      encoder: makes tokens of the texts.
      texts: of every piece of `Pieces` up to the last, the separator: texts and, as numbers, the
        tokens between them. Those of what is written are empty: it is tokenised on its own.
    """

    encoder: TextEncoder
    texts: Sequence[Sequence[int | str]]

    def tokens(self, pieces_n: Iterable[int]) -> list[int]:
        """Of a prompt that is made of these pieces."""
        joined: list[int | str] = [""]
        for part in (part for piece in pieces_n for part in self.texts[piece]):
            if isinstance(part, str) and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        return encode(joined, self.encoder, begin=True)
