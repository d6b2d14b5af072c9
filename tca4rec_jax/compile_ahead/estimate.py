"""The memory, products, traffic and time that a lowered program needs on a target."""

import os
import re
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.stages import Lowered

from tca4rec_jax.compile_ahead.targets import Target
from tca4rec_jax.compile_ahead.work import Work, analyse


class Memory(NamedTuple):
    """Bytes of one device."""

    arguments: float
    outputs: float  # without those written over an argument
    temporaries: float
    code: float


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
    def seconds(self) -> dict[str, float | None]:
        """Three estimates of time; None where nothing is known (of a CPU, say).

        product: all kernels at the data sheet's FLOP/s or bandwidth, each the longer of both: a
        bound that no program reaches. collective: at its interconnect bandwidth. compiler: the
        cycles that a TPU's compiler expects, without collectives, at the chip's clock.
        """
        chip, work = self.target.chip, self.work
        if chip is None or work is None:
            return dict.fromkeys(("product", "collective", "compiler"))
        return {
            "product": work.total(
                lambda one: max(one.flops / chip.flops, one.bytes / chip.bandwidth)
            ),
            "collective": work.moved / chip.interconnect,
            "compiler": chip.hertz and work.total(lambda one: one.cycles) / chip.hertz,
        }

    @property
    def collectives(self) -> dict[str, dict[str, float]]:
        """{kind: {"count": how often it runs, "bytes": what a device's links carry}}."""
        found: dict[str, dict[str, float]] = {}
        for one in self.work.collectives if self.work else ():
            kind = found.setdefault(one.kind, {"count": 0.0, "bytes": 0.0})
            kind["count"] += one.times
            kind["bytes"] += one.moved * one.times
        return found


def compile_for(lowered: Lowered, program: str, target: Target) -> Estimate:
    """Compiles a lowered program; a program too large for the memory gives an Estimate too."""
    available = target.chip.memory if target.chip else _host_memory() / target.num_devices
    # Without a GPU no kernel can be timed.
    options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if target.platform == "cuda" else {}
    began = time.perf_counter()
    try:
        compiled = _compiled(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"(?:\(|Used )([\d.]+)([BKMGT])(?:\) exceeds available| of)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        needed = float(found[1]) * 1024.0 ** "BKMGT".index(found[2])
        seconds = time.perf_counter() - began
        return Estimate(program, target, None, needed, available, None, seconds)
    seconds = time.perf_counter() - began
    stats: Any = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    text = compiled.as_text() or ""
    return Estimate(program, target, memory, sum(memory), available, analyse(text), seconds, text)


def _compiled(lowered: Lowered, options: dict[str, Any]) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
    # On a GPU Triton's tiles for a product are found by trying them; here it is left to cuBLAS.
    return lowered.compile(compiler_options=options | {"xla_gpu_enable_triton_gemm": False})


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
