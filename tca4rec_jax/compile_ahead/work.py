"""The work of a compiled program, read from the text of its optimised HLO.

The compilers' own totals count the body of a loop once (and a GPU's compiler gives none), so the
instructions are walked here, each as often as it runs. Understands what XLA writes for CPU, GPU and
TPU: `dot`, `convolution` (a TPU's products), cuBLAS and Triton calls, fusions, loops, conditionals
and collectives.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tca4rec_jax.compile_ahead import hlo
from tca4rec_jax.compile_ahead.hlo import Computation, Instruction

_COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
# What a ring moves over a device's links per byte of the larger side, for groups of n.
_MOVED = {"all-reduce": lambda n: 2 * (n - 1) / n, "collective-permute": lambda n: 1.0}
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "copy-done", "async-done", "async-update"),
}
_HOST = ("infeed", "outfeed", "send", "recv")
_WORKSPACE = re.compile(r"\bs8\[\d+\](\{0\})?")  # of cuBLAS, beside a product's result
_HOST_CALL = re.compile(r'custom_call_target="[^"]*(callback|host|Host)[^"]*"')


class Kernel(NamedTuple):
    """One launched operation: FLOPs of its products, bytes it reads and writes, times it runs."""

    name: str
    flops: float
    bytes: float
    cycles: float  # what a TPU's compiler expects of one run; 0 elsewhere
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

    def total(self, quantity: Callable[[Kernel], float]) -> float:
        """A quantity of one run of a kernel, summed over all that run."""
        return sum(quantity(kernel) * kernel.times for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """The FLOPs of all kernels."""
        return self.total(lambda kernel: kernel.flops)

    @property
    def bytes(self) -> float:
        """The bytes that all kernels read and write."""
        return self.total(lambda kernel: kernel.bytes)

    @property
    def moved(self) -> float:
        """The bytes that all collectives move between devices."""
        return sum(one.moved * one.times for one in self.collectives)


def analyse(text: str) -> Work:
    """Walks an optimised HLO module (`compiled.as_text()`)."""
    computations, entry = hlo.parse(text)
    walk = _Walk(computations, int(hlo.first(r"num_partitions=(\d+)", text) or 1))
    walk.computation(entry, 1.0)
    return walk.work


class _Walk:
    def __init__(self, computations: dict[str, Computation], partitions: int):
        self.computations, self.partitions, self.work = computations, partitions, Work()
        self.fused: set[tuple] = set()

    def computation(self, name: str, times: float) -> None:
        """Adds the work of a computation that runs `times`."""
        for one in self.computations[name]:
            kind = one.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                self._collective(kind, one, times)
            elif kind == "while":
                trips = self._trips(one)
                self.work.unknown_loops += trips is None
                self.computation(one.called("body"), times * (trips or 1))
            elif kind in ("call", "async"):
                self.computation(one.called("to_apply|calls"), times)
            elif kind == "conditional":
                self._costliest_branch(one, times)
            elif kind not in _FREE and not kind.endswith("-done"):
                if kind in _HOST or _HOST_CALL.search(one.attributes):
                    self.work.host_transfers.append(f"{one.opcode} {one.name}")
                body: list[Instruction] = []
                result, flops = self._inline(one, body, times)
                traffic = _traffic(one, body, result)
                cycles = float(hlo.first(r'"estimated_cycles":"(\d+)"', one.attributes) or 0)
                self.work.kernels.append(Kernel(one.name, flops, traffic, cycles, times))

    def _inline(
        self, one: Instruction, body: list[Instruction], times: float
    ) -> tuple[Instruction, float]:
        """Adds to `body` what a kernel runs, with its operands in place of parameters.

        A TPU also puts collectives into fusions: one that runs beside other work stands in several
        (its start, its end, what it runs beside); one whose result is split at once is called
        all-reduce-scatter. Links carry what such a fusion inside another reads: it stays as it is.

        Returns (the result, the FLOPs of the products).
        """
        if one.opcode not in ("fusion", "call", "async-start"):
            body.append(one)
            return one, _product_flops(one)
        name, result, flops = one.called("calls|to_apply"), one, 0.0
        linked: dict[str, Instruction] = {}
        for inner in self.computations[name]:
            kind = inner.opcode.removesuffix("-start")
            if kind == "parameter":
                linked[inner.name] = one.operands[int(inner.literal)]
            else:
                inner = inner._replace(operands=[linked[each.name] for each in inner.operands])
                carried = _is_collective(inner)
                made, products = self._inline(inner, [] if carried else body, times)
                body += [inner] if carried else []
                linked[inner.name] = inner if carried else made
                flops += products
            if kind in _COLLECTIVES and (identity := _identity(inner)) not in self.fused:
                self.fused.add(identity)
                scattered = name.startswith("all-reduce-scatter")
                self._collective("reduce-scatter" if scattered else kind, inner, times)
            if inner.is_root:
                result = linked[inner.name]
        return result, flops

    def _costliest_branch(self, one: Instruction, times: float) -> None:
        names = hlo.names(hlo.first(r"branch_computations=\{([^}]*)\}", one.attributes))
        works = []
        for name in names or map(one.called, ("true_computation", "false_computation")):
            walk = _Walk(self.computations, self.partitions)
            walk.computation(name, times)
            works.append(walk.work)
        most = max(works, key=lambda work: work.flops + work.bytes + work.moved)
        self.work.kernels += most.kernels
        self.work.collectives += most.collectives
        self.work.host_transfers += [line for work in works for line in work.host_transfers]
        self.work.unknown_loops += most.unknown_loops

    def _trips(self, one: Instruction) -> int | None:
        if known := hlo.first(r'"known_trip_count":\{"n":"(\d+)"', one.attributes):
            return int(known)
        # A TPU's compiler does not write it down; the loops of JAX count from 0 to a constant.
        condition = list(self.computations[one.called("condition")])
        for inner in tuple(condition):
            condition += self.computations.get(inner.called("calls"), [])
        compared = [inner for inner in condition if inner.opcode == "compare"]
        bounds = [
            int(inner.literal)
            for inner in condition
            if inner.opcode == "constant" and re.match(r"[su]\d+\[\]", inner.type)
        ]
        counts = len(compared) == len(bounds) == 1 and "direction=LT" in compared[0].attributes
        return bounds[0] if counts else None

    def _collective(self, kind: str, one: Instruction, times: float) -> None:
        operands = sum(hlo.type_bytes(operand.type) for operand in one.operands)
        result = hlo.type_bytes(one.type)
        if one.opcode == "all-gather-start":  # (operands, results)
            result -= operands
        size = operands if kind in _MOVED else max(result, operands)
        group = self._group(one.attributes)
        moved = size * _MOVED.get(kind, lambda n: (n - 1) / n)(group)
        self.work.collectives.append(Collective(kind, one.type, size, moved, group, times))

    def _group(self, attributes: str) -> int:
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
            sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
        if size := hlo.first(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(size)
        members = hlo.integers(hlo.first(r"replica_groups=\{\{([\d,]*)\}", attributes))
        return len(members) or self.partitions


def _traffic(kernel: Instruction, body: list[Instruction], result: Instruction) -> float:
    """The bytes of operands and result outside a TPU's VMEM: of a sliced operand the slices, of one
    updated in place the update, and nothing of what is passed on or carried by links."""
    if kernel.opcode.endswith("-start"):  # (operand, result, context): one's size is copied
        return sorted((0.0, 0.0, *(array.bytes for array in hlo.arrays(kernel.type))))[-2]
    operands = {_origin(operand).name: _hbm_bytes(operand) for operand in kernel.operands}
    read = dict.fromkeys(operands, 0.0)
    for user in body:
        for place, operand in enumerate(user.operands):
            if (name := _origin(operand).name) in read:
                read[name] += _read(user, place)
    total = sum(min(read[name], whole) for name, whole in operands.items())
    for one in map(_origin, result.operands if result.opcode == "tuple" else [result]):
        if one.opcode == "dynamic-update-slice":
            total += _hbm_bytes(one.operands[1])
        elif one.name not in operands and not _is_collective(one):
            total += _hbm_bytes(one._replace(type=_WORKSPACE.sub("", one.type)))
    return total


def _read(user: Instruction, place: int) -> float:
    """The bytes that an instruction reads of an operand; infinite for all of it."""
    if user.opcode in ("bitcast", "tuple") or _is_collective(user):
        return 0.0
    if place == 0 and user.opcode in ("dynamic-slice", "gather"):
        return _hbm_bytes(user)
    return 0.0 if place == 0 and user.opcode == "dynamic-update-slice" else math.inf


def _origin(one: Instruction) -> Instruction:
    return _origin(one.operands[0]) if one.opcode == "bitcast" else one


def _hbm_bytes(one: Instruction) -> float:
    return hlo.type_bytes(one.type, on_chip=False)


def _product_flops(one: Instruction) -> float:
    """2 for every multiplication of a dot, convolution or matrix product call; else 0."""
    if one.opcode == "convolution":
        return _convolution_flops(one)
    if one.opcode == "dot":
        contracted = hlo.integers(hlo.first(r"lhs_contracting_dims=\{([^}]*)\}", one.attributes))
    elif one.opcode == "custom-call" and re.search(r"gemm|matmul", one.attributes):
        listed = hlo.first(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        contracted = hlo.integers(listed) or (-1,)
    else:
        return 0.0
    lhs = one.operands[0].dimensions
    return 2.0 * math.prod(one.dimensions) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(one: Instruction) -> float:
    """A TPU writes the batch axes of a product as spatial ones, most of whose taps are padding."""
    labels = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)[0]
    sizes = [each.dimensions for each in (*one.operands[:2], one)]
    lhs, rhs, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, sizes, strict=True))
    window = dict(re.findall(r"(\w+)=(\S+)", hlo.first(r"window=\{([^}]*)\}", one.attributes)))
    flops = 2.0 * out["b"] * out["f"] * rhs["i"]
    for axis, label in enumerate(sorted(rhs.keys() - {"i", "o"})):
        stride, dilation, tap_dilation, low = (
            int(window[key].split("x")[axis].split("_")[0]) if key in window else absent
            for key, absent in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        place = np.arange(out[label])[:, None] * stride + np.arange(rhs[label]) * tap_dilation - low
        last = (lhs[label] - 1) * dilation
        flops *= int(((place >= 0) & (place <= last) & (place % dilation == 0)).sum())
    return flops


def _is_collective(one: Instruction) -> bool:
    return one.opcode in _COLLECTIVES or "AsyncCollective" in one.attributes


def _identity(one: Instruction) -> tuple:
    """What tells fused collectives apart: JAX's own all have channel 1, in a chain each."""
    ids = [hlo.first(rf'{name}="?(\d+)', one.attributes) for name in ("channel_id", "chain_id")]
    return one.opcode, *[array.dimensions for array in hlo.arrays(one.type)], *ids
