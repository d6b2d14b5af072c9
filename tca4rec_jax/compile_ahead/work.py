"""The work of a compiled program, read from the text of its optimised HLO.

The compilers' own totals count the body of a loop once (and a GPU's compiler gives none), so the
instructions are walked here, each as often as it runs. Understands what XLA writes for CPU, GPU and
TPU: `dot`, `convolution` (a TPU's products), cuBLAS and Triton calls, fusions, loops, conditionals
and collectives.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tca4rec_jax.compile_ahead.hlo import (
    NAME,
    Computation,
    Instruction,
    arrays,
    braced,
    called,
    first,
    integers,
    parse,
    type_bytes,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What a ring moves over a device's links per byte of the larger side, for groups of n.
_MOVED = {"all-reduce": lambda n: 2 * (n - 1) / n, "collective-permute": lambda n: 1.0}
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "copy-done", "async-done", "async-update"),
}
_HOST = ("infeed", "outfeed", "send", "recv")
_HOST_CALL = re.compile(r'custom_call_target="[^"]*(callback|host|Host)[^"]*"')


class Kernel(NamedTuple):
    """One launched operation: FLOPs of its products, bytes it reads and writes, times it runs.

    cycles: the compiler's estimate for one run (TPU), None where it gives none.
    """

    name: str
    flops: float
    bytes: float
    cycles: float | None
    times: float


class Collective(NamedTuple):
    """bytes: of the larger of operand and result on a device; moved: what its links carry."""

    kind: str
    type: str
    bytes: float
    moved: float
    group: int
    times: float


@dataclass
class Work:
    """One device's work. Loops whose length depends on the data count once (unknown_loops)."""

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    host_transfers: list[str] = field(default_factory=list)
    unknown_loops: int = 0

    @property
    def flops(self) -> float:
        """The FLOPs of all kernels."""
        return sum(kernel.flops * kernel.times for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        """The bytes that all kernels read and write."""
        return sum(kernel.bytes * kernel.times for kernel in self.kernels)

    @property
    def moved(self) -> float:
        """The bytes that all collectives move between devices."""
        return sum(one.moved * one.times for one in self.collectives)


def analyse(text: str) -> Work:
    """Walks an optimised HLO module (`compiled.as_text()`)."""
    computations, entry = parse(text)
    partitions = first(r"num_partitions=(\d+)", text)
    walk = _Walk(computations, int(partitions or 1))
    walk.computation(entry, 1.0)
    return walk.work


class _Walk:
    def __init__(self, computations: dict[str, Computation], partitions: int):
        self.computations, self.partitions, self.work = computations, partitions, Work()
        self.fused_collectives: set[tuple] = set()

    def computation(self, name: str, times: float) -> None:
        """Adds the work of a computation that runs `times`."""
        for instruction in self.computations[name].values():
            self.instruction(instruction, self.computations[name], times)

    def instruction(self, one: Instruction, scope: Computation, times: float) -> None:
        """Adds the work of an instruction of the computation `scope`."""
        opcode = one.opcode
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self.work.collectives.append(self._collective(kind, one, scope, times))
        elif opcode == "while":
            trips = self._trips(one)
            self.work.unknown_loops += trips is None
            self.computation(called(one, "body"), times * (trips or 1))
        elif opcode in ("call", "async-start"):
            self.computation(called(one, "to_apply") or called(one, "calls"), times)
        elif opcode == "conditional":
            self._costliest_branch(one, times)
        elif opcode in _FREE or opcode.endswith("-done"):
            pass
        else:
            if kind in _HOST or _HOST_CALL.search(one.attributes):
                self.work.host_transfers.append(f"{opcode} {one.name}")
            self._kernel(one, scope, times)

    def _kernel(self, one: Instruction, scope: Computation, times: float) -> None:
        cycles = first(r'"estimated_cycles":"(\d+)"', one.attributes)
        if one.opcode == "fusion":
            name = called(one, "calls")
            flops, traffic = self._flops_inside(name, times), self._fusion_bytes(one, scope)
        else:
            flops, traffic = product_flops(one, scope), _plain_bytes(one, scope)
        self.work.kernels.append(
            Kernel(one.name, flops, traffic, float(cycles) if cycles else None, times)
        )

    def _flops_inside(self, name: str, times: float) -> float:
        """FLOPs of a fused computation.

        A TPU also puts collectives into fusions: one that runs beside other work stands in several
        (its start, its end, what it runs beside); one whose result is split at once is called
        all-reduce-scatter.
        """
        total, scope = 0.0, self.computations[name]
        for one in scope.values():
            kind = one.opcode.removesuffix("-start")
            if one.opcode in ("fusion", "call", "async-start"):
                inner = called(one, "calls") or called(one, "to_apply")
                total += self._flops_inside(inner, times)
            elif kind in COLLECTIVES:
                if (identity := _identity(one)) in self.fused_collectives:
                    continue
                self.fused_collectives.add(identity)
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                self.work.collectives.append(self._collective(kind, one, scope, times))
            else:
                total += product_flops(one, scope)
        return total

    def _costliest_branch(self, one: Instruction, times: float) -> None:
        names = NAME.findall(first(r"branch_computations=\{([^}]*)\}", one.attributes))
        names = names or [called(one, f"{side}_computation") for side in ("true", "false")]
        walks = []
        for name in names:
            walk = _Walk(self.computations, self.partitions)
            walk.computation(name, times)
            walks.append(walk.work)
        most = max(walks, key=lambda work: work.flops + work.bytes + work.moved)
        self.work.kernels += most.kernels
        self.work.collectives += most.collectives
        self.work.host_transfers += [line for work in walks for line in work.host_transfers]
        self.work.unknown_loops += most.unknown_loops

    def _trips(self, one: Instruction) -> int | None:
        if known := first(r'"known_trip_count":\{"n":"(\d+)"', one.attributes):
            return int(known)
        # A TPU's compiler does not write it down; the loops of JAX count from 0 to a constant.
        condition = dict(self.computations[called(one, "condition")])
        for inner in list(condition.values()):
            if inner.opcode == "fusion":
                condition |= self.computations[called(inner, "calls")]
        compared = [i for i in condition.values() if i.opcode == "compare"]
        bounds = [
            int(i.literal)
            for i in condition.values()
            if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type)
        ]
        if len(compared) == 1 and "direction=LT" in compared[0].attributes and len(bounds) == 1:
            return bounds[0]
        return None

    def _collective(self, kind, one, scope, times) -> Collective:
        operands = [type_bytes(scope[name].type) for name in one.operands if name in scope]
        result = type_bytes(one.type)
        if one.opcode.endswith("-start") and kind == "all-gather":  # (operands, results)
            result -= sum(operands)
        size = sum(operands) if kind in ("all-reduce", "collective-permute") else result
        size = max(size, sum(operands))
        group = self._group(one.attributes)
        moved = size * _MOVED.get(kind, lambda n: (n - 1) / n)(group)
        return Collective(kind, one.type, size, moved, group, times)

    def _group(self, attributes: str) -> int:
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
        if size := first(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(size)
        if members := first(r"replica_groups=\{\{([\d,]*)\}", attributes):
            return len(integers(members))
        return self.partitions

    def _fusion_bytes(self, fusion: Instruction, scope: Computation) -> float:
        """The bytes of operands and result; of a sliced operand the slices, of one that is updated
        in place the update."""
        inner = called(fusion, "calls")
        total = self._written_bytes(inner)
        for index, name in enumerate(fusion.operands):
            whole = _traffic(scope[name].type)
            sliced = self._sliced_bytes(inner, self._parameter(inner, index))
            total += whole if sliced is None else min(sliced, whole)
        return total

    def _parameter(self, computation: str, index: int) -> str:
        return next(
            one.name
            for one in self.computations[computation].values()
            if one.opcode == "parameter" and int(one.literal) == index
        )

    def _sliced_bytes(self, computation: str, name: str) -> float | None:
        """The bytes read of a value that is only sliced; None if it is used as a whole."""
        total = 0.0
        for user in self.computations[computation].values():
            if name not in user.operands:
                continue
            part: float | None = None
            if user.opcode == "bitcast":
                part = self._sliced_bytes(computation, user.name)
            elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
                part = _traffic(user.type)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                part = 0.0
            elif user.opcode == "tuple" or _is_collective(user):
                part = 0.0  # passed on; what links carry is counted as such
            elif user.opcode == "fusion":
                inner = called(user, "calls")
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                parts = [self._sliced_bytes(inner, self._parameter(inner, i)) for i in places]
                known = [part for part in parts if part is not None]
                part = sum(known) if len(known) == len(parts) else None
            if part is None:
                return None
            total += part
        return total

    def _written_bytes(self, computation: str) -> float:
        inner = self.computations[computation]
        root = next(one for one in inner.values() if one.is_root)
        names = root.operands if root.opcode == "tuple" else (root.name,)
        total = 0.0
        for name in names:
            one = inner[name]
            while one.opcode == "bitcast":
                one = inner[one.operands[0]]
            if one.opcode == "dynamic-update-slice":
                total += _traffic(inner[one.operands[1]].type)
            elif one.opcode == "fusion":
                total += self._written_bytes(called(one, "calls"))
            elif one.opcode == "parameter" or _is_collective(one):
                pass
            else:
                total += _traffic(one.type)
        return total


def _traffic(text: str) -> float:
    return type_bytes(text, on_chip=False)


def _plain_bytes(one: Instruction, scope: Computation) -> float:
    if one.opcode in ("dynamic-slice", "gather"):
        return 2 * _traffic(one.type)
    if one.opcode == "dynamic-update-slice":
        return 2 * _traffic(scope[one.operands[1]].type)
    if one.opcode.endswith("-start"):  # (operand, result, context): what is copied has one's size
        sizes = sorted(array.bytes for array in arrays(one.type))
        return sizes[-2] if len(sizes) > 1 else 0.0
    return _traffic(one.type) + sum(_traffic(scope[n].type) for n in one.operands if n in scope)


def product_flops(one: Instruction, scope: Computation) -> float:
    """2 for every multiplication of a dot, convolution or matrix product call; else 0."""
    if one.opcode == "dot":
        contracted = braced(one, "lhs_contracting_dims")
    elif one.opcode == "custom-call" and re.search(r"gemm|matmul", one.attributes):
        listed = first(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        contracted = integers(listed.replace('"', "")) or (-1,)
    elif one.opcode == "convolution":
        return _convolution_flops(one, scope)
    else:
        return 0.0
    lhs, out = (arrays(text)[0].dimensions for text in (scope[one.operands[0]].type, one.type))
    return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(one: Instruction, scope: Computation) -> float:
    """A TPU writes the batch axes of a product as spatial ones, most of whose taps are padding."""
    types = (*[scope[name].type for name in one.operands[:2]], one.type)
    lhs, rhs, out = (arrays(text)[0].dimensions for text in types)
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs_labels, rhs_labels, out_labels = labels[0]
    window = first(r"window=\{([^}]*)\}", one.attributes).split()
    given = {key: value.split("x") for key, _, value in (part.partition("=") for part in window)}
    flops = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")]
    flops *= rhs[rhs_labels.index("i")]
    for axis, label in enumerate(sorted(label for label in rhs_labels if label.isdigit())):
        stride, dilation, tap_dilation = (
            int(given[key][axis]) if key in given else 1
            for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(given["pad"][axis].split("_")[0]) if "pad" in given else 0
        outs = np.arange(out[out_labels.index(label)])[:, None] * stride
        place = outs + np.arange(rhs[rhs_labels.index(label)]) * tap_dilation - low
        last = (lhs[lhs_labels.index(label)] - 1) * dilation
        flops *= int(((place >= 0) & (place <= last) & (place % dilation == 0)).sum())
    return flops


def _is_collective(one: Instruction) -> bool:
    return one.opcode in COLLECTIVES or "AsyncCollective" in one.attributes


def _identity(one: Instruction) -> tuple:
    """What tells fused collectives apart: JAX's own all have channel 1, in a chain each."""
    ids = [first(rf'{name}="?(\d+)', one.attributes) for name in ("channel_id", "chain_id")]
    shapes = [array.dimensions for array in arrays(one.type)]
    return one.opcode, *shapes, *ids
