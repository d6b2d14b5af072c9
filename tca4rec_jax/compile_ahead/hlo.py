"""Reads the text of an optimised HLO module: computations, instructions, types and their bytes."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_IN_VMEM = re.compile(r"T\(.*S\(1\)")  # of a TPU: tiled, in memory space 1
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(  # name = type opcode(operands), attribute=...
    r"  (ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*?)\)(, [\w\-]+=.*)?$"
)


class Array(NamedTuple):
    """An array of an HLO type; in_vmem: it lies in a TPU's VMEM."""

    bytes: float
    dimensions: tuple[int, ...]
    in_vmem: bool


class Instruction(NamedTuple):
    """One line of an HLO computation; literal: the text between its parentheses."""

    name: str
    type: str
    opcode: str
    literal: str
    attributes: str
    operands: "list[Instruction]"
    is_root: bool

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The sizes of the axes of the (first) result."""
        return arrays(self.type)[0].dimensions

    def called(self, attribute: str) -> str:
        """The computation that an attribute such as `body` or `calls|to_apply` names, or ''."""
        return first(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)


Computation = list[Instruction]


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
    """({name: computation}, name of the entry); raises ValueError if there is no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            entry = header[2] if header[1] else entry
            current = computations[header[2]] = {}
        elif found := _INSTRUCTION.match(line):
            root, name, kind, opcode, literal, attributes = found.groups("")
            operands = [current[operand] for operand in names(literal) if operand in current]
            current[name] = Instruction(
                name, kind, opcode, literal, attributes, operands, is_root=bool(root)
            )
    if not entry:
        raise ValueError("no ENTRY computation: this is no HLO module's text")
    return {name: list(found.values()) for name, found in computations.items()}, entry


def names(text: str) -> list[str]:
    """The names in a text such as '%a, %b'."""
    return re.findall(r"%([\w.\-]+)", text)


def first(pattern: str, text: str) -> str:
    """The group of a pattern's first match; '' if there is none."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def integers(text: str) -> tuple[int, ...]:
    """The integers of a list such as '1,2' or '"0"'."""
    return tuple(map(int, re.findall(r"\d+", text)))
