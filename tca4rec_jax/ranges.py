"""The range of a field, written as its annotation beside its default, and the one check of it.

    learning_rate: Positive = 1e-4
    targets: Literal["all", "last"] = "all"
    num_layers: Count | None = None

`check_fields` reads the annotations of a dataclass or a NamedTuple, so that every refusal has the
form `name is VALUE: expected ...`.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from tca4rec_jax.errors import UserError


class Range(NamedTuple):
    """Which values of a type a field may have: in words, and as a function."""

    words: str
    holds: Callable[[Any], bool]


def one_of(choices: Collection) -> Range:
    """These values only."""
    return Range(f"one of {', '.join(map(repr, choices))}", lambda value: value in choices)


def _accepted_by(function: Callable, error: type[Exception]) -> Callable[[Any], bool]:
    """Whether a function takes a value without this error."""

    def holds(value: Any) -> bool:
        try:
            function(value)
        except error:
            return False
        return True

    return holds


def _ascending(numbers: Sequence) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


Count = Annotated[int, Range("at least 1", lambda n: n >= 1)]
Port = Annotated[int, Range("1 to 65535", lambda n: 1 <= n <= 65535)]
Natural = Annotated[int, Range("at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Range("0 to 4294967295", lambda n: 0 <= n < 2**32)]  # JAX drops higher bits
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Share = Annotated[float, Range("0 to 1", lambda x: 0 <= x <= 1)]
Rate = Annotated[float, Range("at least 0, below 1", lambda x: 0 <= x < 1)]
# Logits are divided by one in float32, which must not overflow.
Temperature = Annotated[float, Range("0.000001 to 1000000", lambda x: 1e-6 <= x <= 1e6)]
Fractions = Annotated[
    tuple[float, float, float],
    Range("three above 0 that sum to 1", lambda x: min(x) > 0 and abs(sum(x) - 1) <= 1e-6),
]
Temperatures = Annotated[tuple[Temperature, ...], Range("at least one", bool)]
Bounds = Annotated[tuple[Temperature, Temperature], Range("ascending", _ascending)]
Span = Annotated[tuple[Natural, Natural], Range("ascending", _ascending)]
Buckets = Annotated[tuple[Count, ...], Range("ascending", _ascending)]
Cutoffs = Annotated[Buckets, Range("at least one", bool)]
Text = Annotated[str, Range("a text that is not empty", bool)]
Texts = Annotated[tuple[Text, ...], Range("at least one text", bool)]
Regex = Annotated[str, Range("a regular expression", _accepted_by(re.compile, re.error))]
Encoding = Annotated[
    str, Range("a text encoding, such as cp1252", _accepted_by("".encode, LookupError))
]
Date = Annotated[
    str, Range("a date such as 2016-10-01", _accepted_by(datetime.fromisoformat, ValueError))
]
Samples = Annotated[
    tuple[Natural, Natural, Natural], Range("three numbers of at least 0", lambda x: min(x) >= 0)
]
LocalPath = Annotated[str, Range("a local path, not a URL", lambda path: "://" not in path)]


def _is_folder_name(name: str) -> bool:
    return not {"/", "\0"} & {*name} and name not in ("", ".", "..")


FolderName = Annotated[str, Range("the name of a folder", _is_folder_name)]
FolderNameOrEmpty = Annotated[
    str, Range("the name of a folder, or ''", lambda name: not name or _is_folder_name(name))
]

_NUMBERS = {
    int: ("a whole number", lambda value: isinstance(value, Integral)),
    float: ("a finite number", lambda value: isinstance(value, Real) and math.isfinite(value)),
}


def check(name: str, value: object, annotation: Any) -> None:
    """Raises UserError, in one line, for a value that is not what the annotation says."""
    if words := expected(annotation, value):
        raise UserError(f"{name} is {value!r}: expected {words}")


def check_fields(fields: Any, whose: str = "") -> None:
    """`check` of every field of a dataclass or NamedTuple; `whose` comes before their names."""
    for name, annotation in annotations(type(fields)).items():
        check(whose + name, getattr(fields, name), annotation)


def annotations(kind: Any) -> dict[str, Any]:
    """The annotations of a class' fields by name, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def plain_type(annotation: Any) -> type:
    """The type of an annotation's values: of `X | None` that of X, of `tuple[...]` tuple."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return type(args[0])
    return plain_type(args[0]) if origin in (Annotated, Union, UnionType) else origin or annotation


def range_words(annotation: Any) -> str:
    """The range of an annotation in words, '' if it is a type alone."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(repr, args))
    if origin is Annotated:
        return "; ".join(filter(None, [range_words(args[0]), *(one.words for one in args[1:])]))
    if origin is tuple and args[-1] is Ellipsis:
        return (words := range_words(args[0])) and f"each {words}"
    return range_words(args[0]) if origin in (Union, UnionType) else ""


def expected(annotation: Any, value: Any) -> str:
    """What an annotation says a value must be; '' if it is."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = (one.words for one in args[1:] if not one.holds(value))
        return expected(args[0], value) or next(ranges, "")
    if origin in (Union, UnionType):
        return "" if value is None and NoneType in args else expected(args[0], value)
    if origin is Literal:
        return "" if value in args else one_of(args).words
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(kinds):
            return f"{len(kinds)} values"
        return next(filter(None, map(expected, kinds, value)), "")
    words, holds = _NUMBERS.get(annotation, ("", lambda value: True))
    return "" if holds(value) and not isinstance(value, bool) else words
