"""The errors that speak to the user."""

from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """What is wrong with the user's input, data or machine; the launcher prints it in one line."""


def check_choices(fields: Any, whose: str) -> None:
    """Raises UserError for a field of a dataclass that is annotated as a Literal but is none."""
    for name, hint in get_type_hints(type(fields)).items():
        value, choices = getattr(fields, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise UserError(f"{whose}{name} is {value!r}: expected one of {choices}")
