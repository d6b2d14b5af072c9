"""The device mesh and where arrays live on it.

The batch is split over the axis 'data'; the model is replicated.  A mesh of one device runs the
same code.  On CPU give every core a device of its own (`use_cpu_cores`): two single-threaded
programs side by side do more work than one with two threads.
"""

import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_cpu_cores() -> None:
    """One JAX device per CPU core, if JAX runs on CPU; call before the first use of a device.

    Does nothing where XLA_FLAGS or the configuration already set the number of CPU devices.
    """
    already = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not already and jax.config.jax_num_cpu_devices < 1:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of all (or the first `num_devices`) devices along 'data'."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree):
    """Puts a copy of every array on each device."""
    return jax.device_put(tree, replicated(mesh))


def shard_batch(mesh: Mesh, tree):
    """Splits the leading axis of every array over 'data'."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ValueError, naming the field, if the batch does not divide over the mesh."""
    if batch_size < 1 or batch_size % mesh.shape["data"]:
        raise ValueError(
            f"{field} is {batch_size}, but must be a multiple of the {mesh.shape['data']} devices "
            "that share the batch"
        )
