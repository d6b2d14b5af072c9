"""Fills the decoder's parameters with the tensors of a file, straight onto their devices.

Files hold [out, in] matrices, one tensor per layer; the decoder's are [in, out] and stacked over
layers. Every shard of a parameter is allocated once, in its dtype, and filled piece by piece. The
host holds one parameter and one piece at a time (for a quantised parameter, one layer's floats). On
CPU the filled memory is the array itself, shared by all devices that hold the same shard.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import SCALES, DecoderConfig
from tca4rec_jax.llm.quantisation import quantise

Index = tuple[slice, ...]
PIECE_BYTES = 16 << 20
# JAX on CPU uses host memory without a copy if it is aligned to so many bytes.
ALIGNMENT = 64


class StoredTensor(NamedTuple):
    """A tensor that has not been read: its shape and a function that reads a part of it."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]


class ParamPath(NamedTuple):
    """Where a tensor goes: the decoder's parameter, and its layer; None if it has none."""

    path: str
    layer: int | None


def is_transposed(path: str) -> bool:
    """Whether a file holds the parameter transposed: it does for every matrix but the embedding."""
    return path.endswith("_proj") or path == "lm_head"


def load_parameters(
    config: DecoderConfig,
    tensors: dict[str, StoredTensor],
    targets: dict[str, ParamPath],
    dtype: jnp.dtype,
    sharding: Callable[[DecoderConfig, str], Sharding] | None = None,
    quantised: str = "",
    num_layers: int = 0,
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """Reads the tensors of a file -> (config of the loaded decoder, its parameters by path).

    Args:
      config: architecture of the file's model.
      tensors: the tensors by the file's names.
      targets: the file's name -> parameter and layer, for all parameters, with layers in order.
      dtype: of the parameters that stay floats.
      sharding: (config, path) -> the parameter's sharding; None puts all on the first device.
      quantised: how the projections are stored, a key of config.SCALES, or '' for floats. A layer's
        matrix is quantised on the first device before the next one is read.
      num_layers: read so many layers only, from the first; 0 reads all.

    Raises:
      UserError: every tensor that is missing, unknown or of another shape, by name; more layers
        than there are.
    """
    if num_layers > config.num_layers:
        raise UserError(f"num_layers is {num_layers}, but the model has {config.num_layers}")
    _check_tensors(config, tensors, targets)
    sources: dict[str, list[StoredTensor]] = {}
    for name, target in targets.items():
        sources.setdefault(target.path, []).append(tensors[name])
    params: dict[str, jax.Array] = {}
    config = dataclasses.replace(config, num_layers=num_layers or config.num_layers)
    stored = dataclasses.replace(config, quantised=quantised)
    for path, shape in config.parameter_shapes.items():
        if quantised and path.removeprefix("layers/") in config.projection_shapes:
            params |= _quantised_parameter(stored, path, sources[path], sharding)
            continue
        where = sharding(stored, path) if sharding else SingleDeviceSharding(jax.devices()[0])
        shard = functools.partial(_shard, config, path, sources[path], dtype=dtype)
        params[path] = jax.make_array_from_callback(shape, where, shard).block_until_ready()
    return stored, params


def _check_tensors(
    config: DecoderConfig, tensors: dict[str, StoredTensor], targets: dict[str, ParamPath]
) -> None:
    problems = [f"unknown tensor {name}" for name in tensors if name not in targets]
    problems += [f"missing tensor {name}" for name in targets if name not in tensors]
    for name, (path, layer) in targets.items():
        wanted = config.parameter_shapes[path][layer is not None :]
        wanted = wanted[::-1] if is_transposed(path) else wanted
        if name in tensors and tensors[name].shape != wanted:
            problems.append(f"{name} has shape {tensors[name].shape}, expected {wanted}")
    if problems:
        raise UserError("tensors that do not fit the config: " + "; ".join(problems))


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


def _quantised_parameter(
    config: DecoderConfig,
    path: str,
    sources: list[StoredTensor],
    sharding: Callable[[DecoderConfig, str], Sharding] | None,
) -> dict[str, jax.Array]:
    """Codes and scales of a projection, made once for all shards of the same outputs."""
    inputs = config.projection_shapes[path.removeprefix("layers/")][0]
    made: dict[tuple[range, range], list[np.ndarray]] = {}

    def parts(layers: range, outputs: range) -> list[np.ndarray]:
        weight = np.empty((inputs, len(outputs)), np.float32)
        stacks = []
        for slot, layer in enumerate(layers):
            _fill(weight.T, sources[layer], [outputs, range(inputs)])
            for which, part in enumerate(map(np.asarray, quantise(config.quantised, weight))):
                if slot == 0:
                    stacks.append(_aligned_empty((len(layers), *part.shape), part.dtype))
                stacks[which][slot] = part
        return stacks

    def shard(which: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
        layers, *rows, outputs = index
        key = range(shape[0])[layers], range(shape[-1])[outputs]
        if key not in made:
            made[key] = parts(*key)
        return made[key][which][:, *rows]

    params = {}
    for which, name in enumerate((path, path + SCALES[config.quantised])):
        where = sharding(config, name) if sharding else SingleDeviceSharding(jax.devices()[0])
        shape = config.parameter_shapes[name]
        params[name] = jax.make_array_from_callback(
            shape, where, functools.partial(shard, which, shape)
        )
    return jax.block_until_ready(params)


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
