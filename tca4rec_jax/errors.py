"""The errors that speak to the user."""

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """What is wrong with the user's input, data or machine; the launcher prints it in one line."""


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raises UserError, naming the choices, if a value is none of them."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: expected one of {', '.join(map(repr, choices))}")


def check_choices(fields: Any, whose: str) -> None:
    """Raises UserError for a field of a dataclass that is annotated as a Literal but is none."""
    for name, hint in get_type_hints(type(fields)).items():
        if get_origin(hint) is Literal:
            check_choice(whose + name, getattr(fields, name), get_args(hint))
