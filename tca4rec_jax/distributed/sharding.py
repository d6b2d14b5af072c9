"""The device mesh, and the sharding of every array on it.

The mesh has three axes:
  data    splits the rows of a batch and replicates the model.
  fsdp    splits the rows too, and every matrix of the model: training gathers a layer's matrices
          for the time the layer runs; beam search leaves them split.
  tensor  splits the heads, the feed-forward width and the vocabulary (tensor parallelism), and the
          items of the CF logits.

`RULES` maps logical axes to mesh axes. A mesh of one device runs the same code. On CPU every core
should be a device (`use_cpu_cores`): two single-threaded programs side by side do more work than
one with two threads.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.config import DecoderConfig, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")
# Of a decoder.
_PARTS = ("projector", "new_rows", "layers", "adapters", "embedding", "lm_head", "final_norm")
MeshAxes = str | tuple[str, ...] | None
_CUBLAS_FLAGS = {"xla_gpu_enable_triton_gemm": "false", "xla_gpu_dot_merger_threshold_mb": "0"}


def axis_names(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes in a rule or in an entry of a PartitionSpec, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axis or axes that split it; None replicates it.

    A dimension that does not divide over its mesh axes is replicated too (`sharding_of`).
    """

    batch: MeshAxes = ("data", "fsdp")  # rows of a training batch
    prompts: MeshAxes = "data"  # rows of a beam search
    items: MeshAxes = "tensor"  # of the CF logits, in training
    vocabulary: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    feed_forward: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    norm: MeshAxes = None
    layers: MeshAxes = None
    adapter: MeshAxes = None  # the adapters' wide axis: they are small
    rank: MeshAxes = None

    def __post_init__(self):
        for axis in vars(self):
            unknown = sorted(set(self.mesh_axes(axis)) - set(MESH_AXES))
            if unknown:
                raise ValueError(f"rule {axis!r}: no mesh axis {unknown[0]!r} in {MESH_AXES}")

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis; raises ValueError for one that has no rule."""
        if axis is None:
            return ()
        if axis not in vars(self):
            raise ValueError(f"no rule for the axis {axis!r}; there are {', '.join(vars(self))}")
        return axis_names(getattr(self, axis))

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """An array's PartitionSpec; raises ValueError if a mesh axis splits two of its axes."""
        for axis, other in itertools.combinations(axes, 2):
            for name in set(self.mesh_axes(axis)) & set(self.mesh_axes(other)):
                raise ValueError(
                    f"an array of {tuple(axes)}: {axis!r} and {other!r} are both split over the "
                    f"mesh axis {name!r}; change one of these rules"
                )
        return PartitionSpec(*map(self.mesh_axes, axes))


RULES = Rules()


def use_cpu_cores() -> None:
    """Makes every CPU core a JAX device unless their number is set; call before using a device."""
    already = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not already and jax.config.values["jax_num_cpu_devices"] < 1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def leave_products_to_cublas() -> None:
    """For NVIDIA GPUs, unless XLA_FLAGS says otherwise; call before using a device.

    XLA's own products (Triton), and those that it merges into one, copy a layer's weights out of
    their stack at every use, which a search feels: it has few tokens for them. They pay in training
    (what is elementwise runs with them) and where a product dequantises its weights.
    """
    given = os.environ.get("XLA_FLAGS", "")
    more = [f"--{name}={value}" for name, value in _CUBLAS_FLAGS.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *more])


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence | None = None
) -> Mesh:
    """The mesh of these sizes; data = -1 takes all devices that the other two axes leave.

    A single process leaves out devices that the mesh does not need. Raises UserError for sizes that
    are not positive, or do not fit the number of devices (all of JAX by default).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and (name, size) != ("data", -1):
            raise UserError(f"mesh.{name} is {size}: expected at least 1 (or -1 for mesh.data)")
    rest = fsdp * tensor
    if data == -1 and len(devices) % rest:
        raise UserError(
            f"mesh.fsdp * mesh.tensor is {rest}, which does not divide the {len(devices)} devices"
        )
    sizes["data"] = len(devices) // rest if data == -1 else data
    count = math.prod(sizes.values())
    if count > len(devices) or (count < len(devices) and jax.process_count() > 1):
        raise UserError(
            f"mesh {sizes} is of {count} devices, there are {len(devices)}: set mesh.data=-1 for "
            "all of them"
        )
    types, devices = (AxisType.Auto,) * len(MESH_AXES), devices[:count]
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)


def mesh_for_batches(data: int, fsdp: int, tensor: int, *, batch: int, prompts: int) -> Mesh:
    """`make_mesh` for batches of these sizes (rows of a training batch, rows of a beam search).

    On CPU, data = -1 takes the largest number of cores that divides both; XLA uses the remaining
    cores inside the devices. (On accelerators the config's author has counted the devices.) Raises
    UserError as `make_mesh`.
    """
    on_one_host = jax.default_backend() == "cpu" and jax.process_count() == 1
    if on_one_host and data == -1 and min(fsdp, tensor) > 0:
        count = jax.device_count() // (fsdp * tensor)
        fitting = (d for d in range(1, count + 1) if batch % (d * fsdp) == 0 == prompts % d)
        data = max(fitting, default=-1)
        if 0 < data < count:
            logging.info("The batch is split over %d of the %d CPU devices", data, count)
    return make_mesh(data, fsdp, tensor)


def sharding_of(
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    *,
    units: Mapping[str, int] | None = None,
) -> NamedSharding:
    """The sharding of an array with one logical axis (None: replicated) for each dimension.

    A dimension that does not divide evenly is replicated: splitting it would cost padding and
    communication at each use. `units` is {logical axis: its number of indivisible units (heads)},
    by default its size. Raises ValueError as `Rules.spec`, or without an axis for each dimension.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} of an array of shape {tuple(shape)}")
    RULES.spec(axes)
    kept = []
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in RULES.mesh_axes(axis) if mesh.shape[name] > 1)
        parts = math.prod(mesh.shape[name] for name in names)
        divides = size % parts == 0 and (units or {}).get(axis or "", size) % parts == 0
        kept.append(names if names and divides else None)
    while kept and kept[-1] is None:
        kept.pop()
    return NamedSharding(mesh, PartitionSpec(*kept))


def parameter_sharding(
    mesh: Mesh, config: DecoderConfig, path: str, shape: Sequence[int] | None = None
) -> NamedSharding:
    """The sharding of the decoder's parameter at `path`; `shape` for those it lacks (adapters).

    Query heads stay with the keys they share: if the kv heads do not divide, both are replicated.
    """
    shape = config.parameter_shapes[path] if shape is None else shape
    units = {"heads": config.num_kv_heads, "kv_heads": config.num_kv_heads}
    return sharding_of(mesh, logical_axes(path), shape, units=units)


def tree_shardings(mesh: Mesh, config: DecoderConfig, tree: Any) -> Any:
    """Where the leaves of a tree of parameters, a training state or a decoder's state live.

    A leaf below a parameter's path (an optimiser's moment) lives where the parameter does, any
    other is replicated, and so are the rows and columns of a factored moment, which are small.
    Leaves may be abstract (ShapeDtypeStruct).
    """

    def of(key_path, leaf):
        # In a training state, an optimiser's or a decoder's state only parameters are in dicts.
        keys = (str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey))
        names = itertools.dropwhile(lambda name: name not in _PARTS, "/".join(keys).split("/"))
        path = "/".join(names)
        if not path or len(logical_axes(path)) != len(leaf.shape):
            return replicated(mesh)
        return parameter_sharding(mesh, config, path, leaf.shape)

    return jax.tree_util.tree_map_with_path(of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, shardings: Any) -> Any:
    """jax.device_put of a tree whose arrays every process holds completely.

    With several processes jax.device_put itself would first gather and compare the arrays.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put_one(array, sharding):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put_one, tree, jax.tree.broadcast(shardings, tree))


def row_sharding(mesh: Mesh, axis: str = "batch") -> NamedSharding:
    """The sharding of arrays whose leading logical axis is 'batch' or 'prompts'."""
    return NamedSharding(mesh, RULES.spec((axis,)))


def local_rows(mesh: Mesh, batch_size: int, axis: str = "batch") -> np.ndarray:
    """int64, ascending: the rows of a batch that this process's devices hold."""
    parts = row_sharding(mesh, axis).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def shard_batch(mesh: Mesh, tree: Any, axis: str = "batch") -> Any:
    """Puts a batch on the mesh, its leading axis split; each process passes its `local_rows`."""
    sharding = row_sharding(mesh, axis)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)  # all arrays at once
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), tree)


def smallest_batch(mesh: Mesh, axis: str = "batch") -> int:
    """The rows of a batch with one row for each of the devices that share it."""
    return math.prod(mesh.shape[name] for name in RULES.mesh_axes(axis))


def check_batch_size(
    mesh: Mesh, batch_size: int, field: str, axis: str = "batch", *, micro_batches: int = 1
) -> None:
    """Raises UserError, naming the field, if the batch does not divide over the mesh.

    So must the part of each device into micro-batches.
    """
    devices = smallest_batch(mesh, axis)
    if batch_size < 1 or batch_size % (devices * micro_batches):
        times = f", times training.micro_batches={micro_batches}" if micro_batches > 1 else ""
        raise UserError(
            f"{field} is {batch_size}, but must be a multiple of the {devices} devices "
            f"({' x '.join(RULES.mesh_axes(axis))}) that share the batch{times}"
        )
