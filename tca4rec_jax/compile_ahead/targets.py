"""Machines that a program can be compiled for elsewhere, with their data sheets.

A target is named like 'v5e-16' or 'h100-8'. TPU slices are counted as Cloud TPU names them: chips
for v5e and v6e, TensorCores (two a chip) for v5p, so v5p-8 has 4 chips. GPUs come in machines of up
to 8. Only the compiler is needed: libtpu, or JAX's CUDA plugin without a driver, in a folder of its
own that nothing but this module looks into.
"""

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.training.throughput import DATASHEET_PEAKS

ROOT = Path(__file__).parents[2]
COMPILERS = ROOT / ".compilers"
WHEELS = {
    "tpu": "libtpu==0.0.42.1",
    "cuda": f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    " nvidia-cuda-nvcc-cu12==12.9.86",
}
GPU_MEMORY_SHARE = 0.92  # XLA_PYTHON_CLIENT_MEM_FRACTION in the launch scripts
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Chip:
    """One device."""

    device_kind: str  # as JAX names it, a key of DATASHEET_PEAKS
    platform: str
    memory: float  # bytes that a program can have
    bandwidth: float  # bytes/s of that memory
    interconnect: float  # bytes/s that it can send to the others of a slice or machine
    hertz: float | None = None  # of a TPU compiler's cycles; None where it is not known

    @property
    def flops(self) -> float:
        """FLOP/s of dense bfloat16 products."""
        return DATASHEET_PEAKS[self.device_kind]


_GiB = 2.0**30
# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e (half of the bidirectional interconnect bandwidth);
# memory is what the compiler allows a program, hertz what gives the documented peak with the MXUs'
# documented size and number (for a v6e these give no clock that fits). GPUs: NVIDIA's data sheets
# (NVLink, half of the sum of both directions; a single RTX A6000 has no peer).
CHIPS = {
    "v5e": Chip("TPU v5 lite", "tpu", 15.75 * _GiB, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5", "tpu", 95.74 * _GiB, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", "tpu", 31.25 * _GiB, 1640e9, 400e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", "cuda", 84942979072 * GPU_MEMORY_SHARE, 3352e9, 450e9),
    "a100": Chip("NVIDIA A100-SXM4-80GB", "cuda", 85100068864 * GPU_MEMORY_SHARE, 2039e9, 300e9),
    "a6000": Chip("NVIDIA RTX A6000", "cuda", 51041271808 * GPU_MEMORY_SHARE, 768e9, 32e9),
}
_SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SLICES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))
_SLICES = {"v5e": _SLICES_2D, "v6e": _SLICES_2D, "v5p": _SLICES_3D}


@dataclass(frozen=True)
class Target:
    """A machine."""

    name: str
    chip: Chip | None  # None: this machine's CPU
    num_devices: int
    topology: str = ""  # the compiler's name of the slice, or of machines of GPUs: '4x4', '1x1x8'

    @classmethod
    def parse(cls, name: str) -> "Target":
        """Raises UserError for a name that is no machine, with those that are."""
        found = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+))?", name)
        family, count = (found[1], int(found[2] or 1)) if found else (name, 1)
        check_choice(f"target {name!r} (give v5e-16, say): its machine", family, ("cpu", *CHIPS))
        if family == "cpu":
            return cls(name, None, count)
        if family in _SLICES:
            per_chip = 2 if family == "v5p" else 1
            slices = {math.prod(shape) * per_chip: shape for shape in _SLICES[family]}
            if count not in slices:
                listed = ", ".join(map(str, slices))
                raise UserError(f"target {name!r}: {family} slices have {listed}")
            shape = slices[count]
        else:
            machines = -(-count // GPUS_PER_MACHINE)
            if count < 1 or (machines > 1 and count % GPUS_PER_MACHINE):
                raise UserError(f"target {name!r}: give 1 to 8 GPUs, or a multiple of 8")
            shape = (1, machines, count // machines)
        return cls(name, CHIPS[family], math.prod(shape), "x".join(map(str, shape)))

    @property
    def platform(self) -> str:
        """'tpu', 'cuda' or 'cpu'."""
        return self.chip.platform if self.chip else "cpu"

    def devices(self) -> list[jax.Device]:
        """Devices to build a mesh of; they compile and cannot run (a CPU's can).

        Raises UserError: the CPU has fewer devices, or the compiler is missing (with the line that
        installs it).
        """
        if self.platform == "cpu":
            cores = jax.devices("cpu")
            if self.num_devices > len(cores):
                raise UserError(f"target {self.name}: this process has {len(cores)} CPU devices")
            return cores[: self.num_devices]
        _load_compiler(self.platform)
        family, name = self.name.split("-")[0], ""
        options: dict[str, Any]
        if self.platform == "tpu":
            name = f"{family}:{self.topology}"
            options = {"chips_per_host_bounds": (1, 1, 1)} if self.num_devices == 1 else {}
        else:
            described = Path(__file__).with_name(f"{family}.txtpb").read_text("utf-8")
            options = {"topology": self.topology, "target_config": described}
        return topologies.get_topology_desc(name, self.platform, **options).devices


def _load_compiler(platform: str) -> None:
    """Makes a platform's compiler known to JAX; call before JAX's first use of a device."""
    folder = COMPILERS / platform
    if not folder.is_dir():
        raise UserError(
            f"the compiler for {platform} is missing; run once, in {ROOT.name}:\n"
            f"  {install_line(platform)}"
        )
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    # Neither a TPU's metadata server nor its lock file is asked for (there is no TPU to share), and
    # no backend but the CPU's is started.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")


def install_line(platform: str) -> str:
    """One pip line; the compiler goes into a folder of its own."""
    target = f"--target=.compilers/{platform}"
    return f".venv/bin/python -m pip install --quiet --no-deps {target} {WHEELS[platform]}"
