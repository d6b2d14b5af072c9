"""Reads the text of an optimised HLO module: computations, instructions, types and their bytes."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_IN_VMEM = re.compile(r"T\(.*S\(1\)")  # of a TPU: tiled, in memory space 1
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array of an HLO type; in_vmem: it lies in a TPU's VMEM."""

    bytes: float
    dimensions: tuple[int, ...]
    in_vmem: bool


class Instruction(NamedTuple):
    """One line of an HLO computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]  # by name


def arrays(text: str) -> list[Array]:
    """The arrays of an HLO type; a tuple has several."""
    found = []
    for dtype, dimensions, layout in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" else int(first(r"(\d+)", dtype) or 0)  # a token has none
        shape = integers(dimensions)
        found.append(Array(bits / 8 * math.prod(shape), shape, bool(_IN_VMEM.search(layout))))
    return found


def type_bytes(text: str, *, on_chip: bool = True) -> float:
    """The bytes of an HLO type, a tuple's added up; without on_chip none in a TPU's VMEM."""
    return sum(array.bytes for array in arrays(text) if on_chip or not array.in_vmem)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({computation: {name: instruction}}, name of the entry)."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif start := _INSTRUCTION.match(line):
            current[start[2]] = _instruction(line[start.end() :], start[2], bool(start[1]))
    if not entry:
        raise ValueError("no ENTRY computation: this is no HLO module's text")
    return computations, entry


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing - 1]
    return Instruction(
        name, kind, rest[:opening], tuple(NAME.findall(literal)), literal, rest[closing:], is_root
    )


def _closing(text: str, opening: int) -> int:
    """The index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def first(pattern: str, text: str) -> str:
    """The group of a pattern's first match; '' if there is none."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def integers(text: str) -> tuple[int, ...]:
    """The integers of a comma-separated list."""
    return tuple(int(part) for part in text.split(",") if part)


def called(one: Instruction, attribute: str) -> str:
    """The computation that an attribute such as `calls` or `body` names; '' if there is none."""
    return first(rf"\b{attribute}=%?([\w.\-]+)", one.attributes)


def braced(one: Instruction, attribute: str) -> tuple[int, ...]:
    """The integers of an attribute such as dimensions={0,1}."""
    return integers(first(rf"\b{attribute}=\{{([\d,]*)\}}", one.attributes))
