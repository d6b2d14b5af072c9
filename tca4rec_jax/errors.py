"""The errors that speak to the user."""

from collections.abc import Iterable


class UserError(ValueError):
    """What is wrong with the user's input, data or machine; the launcher prints it in one line."""


def check_choice(name: str, value: object, choices: Iterable) -> None:
    """Raises UserError, naming the choices, if a value is none of them."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}: expected one of {', '.join(map(repr, choices))}")
