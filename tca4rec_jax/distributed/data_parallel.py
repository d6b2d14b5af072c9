"""Data parallelism: a function of each device's own rows (jax.shard_map), weights split as in FSDP.

Why by hand and not by the compiler: for a step of Llama-3.1-8B on v5e-16 (fsdp 8, tensor 2) XLA's
own partitioning does twice the arithmetic and moves twice the bytes, and on any mesh it would sum
the gradient of every adapter inside the loop over layers (docs/scaling.md has the figures).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.distributed.sharding import RULES, MeshAxes, axis_names

_shard_map = functools.partial(jax.shard_map, check_vma=False)


@dataclass(frozen=True)
class DataParallel:
    """shard_map over the mesh axes that split the rows; the compiler has the other axes.

    Inside, nothing is communicated over the axes of the rows but by `sum` and by a ShardedWeight.
    `axis` is 'batch' (training, over 'data' and 'fsdp') or 'prompts' (search, over 'data').
    """

    mesh: Mesh
    axis: str = "batch"

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The mesh axes that split the rows."""
        return RULES.mesh_axes(self.axis)

    @property
    def rows(self) -> PartitionSpec:
        """The spec of arrays whose leading axis is the rows."""
        return RULES.spec((self.axis,))

    @property
    def automatic(self) -> set[str]:
        """The mesh axes of several devices that are left to the compiler."""
        return {a for a in self.mesh.axis_names if self.mesh.shape[a] > 1} - set(self.row_axes)

    def __call__(self, function: Callable, in_specs, out_specs) -> Callable:
        """The function of each device's rows; specs may name the axes of the rows only."""
        names = set(self.mesh.axis_names) - self.automatic
        return _shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names
        )

    def on_own_part(self, function: Callable, in_specs, out_specs) -> Callable:
        """Inside: a function of each device's own part of arrays that the other axes split too."""
        if not self.automatic:
            return function
        return _shard_map(
            function, in_specs=in_specs, out_specs=out_specs, axis_names=self.automatic
        )

    def manual_part(self, spec: PartitionSpec) -> PartitionSpec:
        """The axes of a spec that are mapped over."""
        return _only(spec, lambda axis: axis not in self.automatic)

    def automatic_part(self, spec: PartitionSpec) -> PartitionSpec:
        """The axes of a spec that are left to the compiler."""
        return _only(spec, lambda axis: axis in self.automatic)

    def sum(self, tree, specs):
        """Inside: sums over all rows of the devices' sums; leaves are split as their specs say.

        Leaves that are not split go in one collective: on CPU several in flight can starve each
        other of threads.
        """
        structure: Any  # for a type checker JAX's class has no methods
        leaves, structure = jax.tree.flatten(tree)
        specs = structure.flatten_up_to(specs)
        together = [leaf for leaf, spec in zip(leaves, specs, strict=True) if not any(spec)]
        flat, unflatten = ravel_pytree(together)
        together = iter(unflatten(jax.lax.psum(flat, self.row_axes)))

        def summed(leaf, spec):
            if not any(spec):
                return next(together)
            # The gradient of a ShardedWeight is summed over the axes that split it already.
            split = {name for axes in self.manual_part(spec) for name in axis_names(axes)}
            left = tuple(a for a in self.row_axes if self.mesh.shape[a] > 1 and a not in split)
            if not left:
                return leaf
            kept = self.automatic_part(spec)
            return self.on_own_part(lambda x: jax.lax.psum(x, left), kept, kept)(leaf)

        return structure.unflatten(map(summed, leaves, specs))


def _only(spec: PartitionSpec, wanted: Callable[[str], bool]) -> PartitionSpec:
    return PartitionSpec(*(tuple(filter(wanted, axis_names(axes))) for axes in spec))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["spec", "on_rows"]
)
@dataclass(frozen=True)
class ShardedWeight:
    """A device's part of a weight, which JAX takes for the weight: put together at each use (FSDP).

    A model computes with it as with an array and does not know that it is split. The gradient is
    summed over the axes that split the weight, and split. Under remat it is put together again.
    """

    part: jax.Array  # a loop over layers takes its leading axis away
    spec: PartitionSpec  # how the mesh splits the weight, by its last axes
    on_rows: DataParallel

    @classmethod
    def wrap(cls, on_rows: DataParallel, x: jax.Array, spec: PartitionSpec):
        """The array itself if the axes of the rows do not split it."""
        spec = PartitionSpec(*spec, *[None] * (x.ndim - len(spec)))
        return cls(x, spec, on_rows) if any(on_rows.manual_part(spec)) else x

    @property
    def dtype(self):
        """The dtype of the weight."""
        return self.part.dtype

    def __getitem__(self, index):
        """With Ellipsis the weight itself, else a part of it without the leading axes."""
        return self if index is Ellipsis else replace(self, part=self.part[index])

    def __jax_array__(self) -> jax.Array:
        spec = PartitionSpec(*self.spec[len(self.spec) - self.part.ndim :])
        split = [(dim, axes) for dim, axes in enumerate(self.on_rows.manual_part(spec)) if axes]

        def gather(x):
            for dim, axes in split:
                x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
            return x

        def divides(size: int, axes: MeshAxes) -> bool:
            shape = self.on_rows.mesh.shape
            return size % math.prod(shape[name] for name in axis_names(axes)) == 0

        sizes = zip(self.part.shape, self.on_rows.automatic_part(spec), strict=True)
        kept = PartitionSpec(*(axes if divides(size, axes) else None for size, axes in sizes))
        return self.on_rows.on_own_part(gather, kept, kept)(self.part)
