"""Fills the decoder's parameters from the tensors of a file, each straight into its place.

Files hold [out, in] matrices, one tensor per layer; the decoder's are [in, out] and stacked over
layers. Every shard of a parameter is allocated once, in its dtype, and filled piece by piece. The
host holds one parameter at a time and one piece; where the device is the host, the filled memory is
the array, for all devices that hold the same shard.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from tca4rec_jax.llm.config import DecoderConfig
from tca4rec_jax.llm.quantisation import quantise

Index = tuple[slice, ...]
PIECE_BYTES = 16 << 20
# JAX on CPU uses host memory as it is if it is aligned so.
ALIGNMENT = 64


class StoredTensor(NamedTuple):
    """A tensor that has not been read: its shape and a function that reads a part of it."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


class Place(NamedTuple):
    """Where a tensor goes: the decoder's parameter and the layer; None if it is not stacked."""

    path: str
    layer: int | None


def is_transposed(path: str) -> bool:
    """Whether a file's tensor is ours transposed: every matrix but the embedding."""
    return path.endswith("_proj") or path == "lm_head"


def load_parameters(
    config: DecoderConfig,
    tensors: dict[str, StoredTensor],
    places: dict[str, Place],
    dtype: jnp.dtype,
    sharding: Callable[[str], Sharding] | None = None,
    quantised: str = "",
) -> dict[str, jax.Array]:
    """The parameters by path, shapes as in `config.parameter_shapes` with this `quantised`.

    Args:
      tensors: by the file's names.
      places: file's name -> place; of every parameter, layers in order.
      dtype: of the parameters.
      sharding: path -> where the parameter lives; the first device if not given.
      quantised: a key of config.SCALES, or '': each projection is quantised before the next one is
        read.

    Raises:
      ValueError: every tensor that is missing, unknown or of another shape, by name.
    """
    _check_tensors(config, tensors, places)
    sources: dict[str, list[StoredTensor]] = {}
    for name, place in places.items():
        sources.setdefault(place.path, []).append(tensors[name])
    params = {}
    for path, shape in config.parameter_shapes.items():
        where = sharding(path) if sharding else SingleDeviceSharding(jax.devices()[0])
        params[path] = jax.make_array_from_callback(
            shape, where, lambda index, path=path: _shard(config, path, sources[path], index, dtype)
        ).block_until_ready()
        if quantised and path.removeprefix("layers/") in config.projection_shapes:
            stored = quantise(quantised, path, params.pop(path), sharding)
            params |= jax.block_until_ready(stored)
    return params


def _check_tensors(config, tensors, places) -> None:
    problems = [f"unknown tensor {name}" for name in tensors if name not in places]
    problems += [f"missing tensor {name}" for name in places if name not in tensors]
    for name, (path, layer) in places.items():
        wanted = config.parameter_shapes[path][layer is not None :]
        wanted = wanted[::-1] if is_transposed(path) else wanted
        if name in tensors and tensors[name].shape != wanted:
            problems.append(f"{name} has shape {tensors[name].shape}, expected {wanted}")
    if problems:
        raise ValueError("tensors that do not fit the config: " + "; ".join(problems))


def _shard(
    config: DecoderConfig, path: str, sources: list[StoredTensor], index: Index, dtype: jnp.dtype
) -> np.ndarray:
    """The part of a parameter at `index`, read from its layers' tensors."""
    ranges = [
        range(*part.indices(size))
        for part, size in zip(index, config.parameter_shapes[path], strict=True)
    ]
    shard = _aligned_empty(tuple(map(len, ranges)), dtype)
    stacked = path.startswith("layers/")
    layers, inner = (ranges[0], ranges[1:]) if stacked else ([0], ranges)
    for slot, layer in zip(shard if stacked else [shard], layers, strict=True):
        if is_transposed(path):
            _fill(slot.T, sources[layer], inner[::-1])
        else:
            _fill(slot, sources[layer], inner)
    return shard


def _fill(slot: np.ndarray, source: StoredTensor, ranges: list[range]) -> None:
    """Copies a tensor's part into slot, a bounded number of rows at a time."""
    rest = tuple(slice(part.start, part.stop) for part in ranges[1:])
    step = max(1, PIECE_BYTES // (math.prod(slot.shape[1:]) * slot.itemsize))
    for first in range(0, len(slot), step):
        rows = ranges[0][first : first + step]
        slot[first : first + step] = source.read((slice(rows.start, rows.stop), *rest))


def _aligned_empty(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(jnp.dtype(dtype)).reshape(shape)
