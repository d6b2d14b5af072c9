"""How fast training runs, against the peak of the machine; the window that is profiled.

Model FLOPs utilisation (MFU) = useful FLOPs / seconds / peak FLOPs. Useful are those that the model
needs (DecoderConfig.flops_per_token) for real tokens: neither padding nor recomputation counts.
"""

import contextlib
import functools
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

# FLOP/s of dense bfloat16 matrix products, by jax's device_kind: cloud.google.com/tpu/docs (v4,
# v5e, v5p, v6e) and NVIDIA's data sheets (half of the value "with sparsity").
DATASHEET_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA RTX A6000": 154.8e12,
}
_SIZE, _CALLS = 1024, 12  # of the measured products: 2 GFLOP each


class Peak(NamedTuple):
    """FLOP/s of all devices of a mesh together, and where the number is from."""

    flops: float
    source: str  # 'data sheet' or 'measured'


def peak_flops(mesh: Mesh, dtype: str) -> Peak:
    """The data sheet's peak where the device is known, else `measured_peak`, once in a process."""
    kind = mesh.devices.flat[0].device_kind
    if kind in DATASHEET_PEAKS:
        return Peak(DATASHEET_PEAKS[kind] * mesh.size, "data sheet")
    return Peak(_measured_once(mesh, dtype), "measured")


def measured_peak(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of matrix products [1024, 1024] on all devices at once: the best of a few calls."""
    rows = PartitionSpec(mesh.axis_names)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    def product(x, w):
        return jnp.dot(x, w, preferred_element_type=x.dtype)

    x, w = jnp.ones((_SIZE * mesh.size, _SIZE), dtype), jnp.ones((_SIZE, _SIZE), dtype)
    seconds = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(product(x, w))
        seconds.append(time.perf_counter() - began)
    return 2 * _SIZE**3 * mesh.size / min(seconds)


_measured_once = functools.cache(measured_peak)


def mean_context(lengths: np.ndarray) -> float:
    """Mean number of keys that a token attends to in causal rows of these lengths."""
    lengths = np.asarray(lengths, np.float64)
    return float(np.sum(lengths * (lengths + 1) / 2) / np.sum(lengths))


class ProfilerWindow(contextlib.ExitStack):
    """Records steps [first, last) with jax.profiler; nothing if the window is empty."""

    def __init__(self, directory: Path, first: int, last: int):
        super().__init__()
        self._directory, self._steps, self._running = directory, range(first, last), False

    def at(self, step: int, state) -> None:
        """Call before `step` is dispatched; `state` is what it starts from."""
        if (step in self._steps) == self._running:
            return
        jax.block_until_ready(state)  # no step is half inside
        self._running = not self._running
        if self._running:
            jax.profiler.start_trace(self._directory)
            self.callback(jax.profiler.stop_trace)
        else:
            self.close()
