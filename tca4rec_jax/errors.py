"""The errors that speak to the user."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class UserError(ValueError):
    """What is wrong with the user's input, data or machine; the launcher prints it in one line."""


class ItemError(UserError):
    """A UserError about items; raised where they are known by their numbers in the catalogue.

    The message is its parts, of which the numbers are items; `items_named` makes ids of them.
    """

    def __init__(self, *parts: str | int):
        super().__init__("".join(map(str, parts)))
        self.parts = parts


@contextlib.contextmanager
def items_named(item_ids: Sequence[str]) -> Iterator[None]:
    """Around what knows items by their numbers alone: an ItemError becomes one with their ids."""
    try:
        yield
    except ItemError as error:
        parts = (one if isinstance(one, str) else repr(item_ids[one]) for one in error.parts)
        raise UserError("".join(parts)) from error


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """'; did you mean X?' with the word that is spelt most like it; '' if none is."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raises UserError, naming the choices, if a value is none of them."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: expected one of {', '.join(map(repr, choices))}")


@contextlib.contextmanager
def reading(path: Path | str, kind: str, *, remedy: str = "fetch it again") -> Iterator[None]:
    """Around the parsing of a file of some `kind` ('GGUF file') that may be damaged or hostile.

    Whatever its content makes a library raise becomes a UserError of one line that names the file.
    """
    try:
        yield
    except UserError as error:
        line = one_line(error)
        raise type(error)(line if str(path) in line else f"{path}: {line}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or one_line(error)}") from error
    except Exception as error:  # parsers raise anything
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a readable {kind} ({one_line(why)}); {remedy}") from error


def one_line(text: object, longest: int = 1000) -> str:
    """What a file or a library says as one line, cut."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."
