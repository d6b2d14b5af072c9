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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.llm.checkpoints import gguf, hugging_face
from tca4rec_jax.llm.checkpoints.hugging_face import Index, StoredTensor, is_transposed
from tca4rec_jax.llm.config import SCALES, DecoderConfig, check_shapes
from tca4rec_jax.llm.quantisation import quantise

PIECE_BYTES = 16 << 20
# JAX on CPU uses host memory without a copy if it is aligned to so many bytes.
ALIGNMENT = 64


def read_architecture(path: str | Path) -> DecoderConfig:
    """The architecture of a Hugging Face folder or a GGUF file, without its tensors.

    Raises UserError as `hugging_face.read_config`, `GGUFFile` and `gguf.read_config`.
    """
    if Path(path).is_dir():
        return hugging_face.read_config(path)
    with reading(path, gguf.KIND):
        return gguf.read_config(gguf.GGUFFile(path))


def load_weights(
    path: str | Path,
    dtype: jnp.dtype = jnp.float32,
    *,
    sharding: Callable[[DecoderConfig, str], Sharding] | None = None,
    quantised: str = "",
    num_layers: int = 0,
) -> tuple[DecoderConfig, dict[str, jax.Array]]:
    """Config and parameters (by path) of a Hugging Face folder or a GGUF file.

    Args:
      dtype: of the parameters that stay floats.
      sharding: (config, path) -> the parameter's sharding; None puts all on the first device.
      quantised: how the projections are stored, a key of config.SCALES, or '' for floats. A layer's
        matrix is quantised on the first device before the next one is read.
      num_layers: read so many layers only, from the first; 0 reads all.

    Raises:
      UserError: as `open_folder` and `open_gguf`; more layers than there are, a config that cannot
        be quantised so, or every tensor that is missing, unknown or of another shape, by name.
    """
    config, tensors, targets = (
        hugging_face.open_folder(path) if Path(path).is_dir() else gguf.open_gguf(path)
    )
    with reading(path, "model"):
        if num_layers > config.num_layers:
            raise UserError(f"num_layers is {num_layers}, but the model has {config.num_layers}")
        shapes = {name: target.tensor_shape(config) for name, target in targets.items()}
        check_shapes("tensors", tensors, shapes)
        config = config.first_layers(num_layers or config.num_layers)
        stored = dataclasses.replace(config, quantised=quantised)
    sources: dict[str, list[StoredTensor]] = {}
    for name, target in targets.items():
        sources.setdefault(target.path, []).append(tensors[name])
    where = sharding or (lambda *_: SingleDeviceSharding(jax.devices()[0]))
    params: dict[str, jax.Array] = {}
    for name, shape in config.parameter_shapes.items():
        if quantised and name.removeprefix("layers/") in config.projection_shapes:
            params |= _quantised_parameter(stored, name, sources[name], where)
            continue
        shard = functools.partial(_shard, name, shape, sources[name], dtype)
        params[name] = jax.make_array_from_callback(shape, where(stored, name), shard)
        params[name].block_until_ready()
    return stored, params


def _shard(
    path: str, shape: tuple[int, ...], sources: list[StoredTensor], dtype: jnp.dtype, index: Index
) -> np.ndarray:
    """The part of a parameter at `index`, read from its layers' tensors."""
    ranges = [range(size)[part] for part, size in zip(index, shape, strict=True)]
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
    sharding: Callable[[DecoderConfig, str], Sharding],
) -> dict[str, jax.Array]:
    """Codes and scales of a projection, made once for all shards of the same outputs."""
    inputs = config.projection_shapes[path.removeprefix("layers/")][0]

    @functools.cache
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
        return parts(range(shape[0])[layers], range(shape[-1])[outputs])[which][:, *rows]

    params = {}
    for which, name in enumerate((path, path + SCALES[config.quantised])):
        shape = config.parameter_shapes[name]
        part = functools.partial(shard, which, shape)
        params[name] = jax.make_array_from_callback(shape, sharding(config, name), part)
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
