"""The memory, products, traffic and time that a lowered program needs on a target."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.stages import Lowered

from tca4rec_jax.compile_ahead.targets import Chip, Target
from tca4rec_jax.compile_ahead.work import Work, analyse


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: float
    outputs: float  # without those written over an argument
    temporaries: float
    code: float

    @property
    def total(self) -> float:
        """The sum of all four."""
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """A program on a target, per device.

    If the compiler refused the program, memory and work are None and `needed` is its own number.
    """

    program: str
    target: Target
    memory: Memory | None
    needed: float
    available: float
    work: Work | None
    compile_seconds: float
    hlo: str = ""

    @property
    def fits(self) -> bool:
        """Whether the program fits into a device's memory."""
        return self.needed <= self.available

    @property
    def product_seconds(self) -> float | None:
        """Seconds of all kernels at the data sheet's FLOP/s or bandwidth, each the longer of both.

        A bound that no program reaches. None for a CPU.
        """
        return self._seconds(
            lambda chip, work: sum(
                max(kernel.flops / chip.flops, kernel.bytes / chip.bandwidth) * kernel.times
                for kernel in work.kernels
            )
        )

    @property
    def collective_seconds(self) -> float | None:
        """Seconds of the collectives at the data sheet's interconnect bandwidth."""
        return self._seconds(lambda chip, work: work.moved / chip.interconnect)

    @property
    def compiler_seconds(self) -> float | None:
        """The cycles that a TPU's compiler expects, collectives left out, at the chip's clock."""
        return self._seconds(
            lambda chip, work: (
                chip.hertz
                and sum(kernel.cycles * kernel.times for kernel in work.kernels) / chip.hertz
            )
        )

    def _seconds(self, of: Callable[[Chip, Work], float | None]) -> float | None:
        chip = self.target.chip
        return of(chip, self.work) if chip and self.work else None

    def collectives(self) -> dict[str, tuple[float, float]]:
        """{kind: (how often it runs, bytes that a device's links carry)}."""
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for one in self.work.collectives if self.work else []:
            count, moved = found[one.kind]
            found[one.kind] = count + one.times, moved + one.moved * one.times
        return dict(found)


def compile_for(lowered: Lowered, program: str, target: Target) -> Estimate:
    """Compiles a lowered program; a program too large for the memory gives an Estimate too."""
    available = target.chip.memory if target.chip else _host_memory() / target.num_devices
    began = time.perf_counter()
    try:
        compiled = _compiled(lowered, target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"(?:\(|Used )([\d.]+)([BKMGT])(?:\) exceeds available| of)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        needed = float(found[1]) * 2.0 ** (10 * "BKMGT".index(found[2]))
        seconds = time.perf_counter() - began
        return Estimate(program, target, None, needed, available, None, seconds)
    seconds = time.perf_counter() - began
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    text = compiled.as_text() or ""
    return Estimate(program, target, memory, memory.total, available, analyse(text), seconds, text)


def _compiled(lowered: Lowered, options: dict[str, str | bool]) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
    # On a GPU Triton's tiles for a product are found by trying them; here it is left to cuBLAS.
    return lowered.compile(compiler_options=options | {"xla_gpu_enable_triton_gemm": False})


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
