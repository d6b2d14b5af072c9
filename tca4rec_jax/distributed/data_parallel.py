"""Functions of each device's own rows, and all that they communicate (jax.shard_map)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.distributed.sharding import RULES, MeshAxes, Rules, axis_names


@dataclass(frozen=True)
class RowParallel:
    """A function of each device's own rows, with what it has to say about communication.

    The rows' mesh axes are manual (jax.shard_map): nothing is communicated over them but by the
    methods below. What the other axes split is left to the compiler. A method that needs a
    device's very own part of an array makes these manual too, as long as it runs: the compiler
    would put the parts together first.
    """

    mesh: Mesh
    axis: str = "batch"
    rules: Rules = RULES

    @property
    def row_axes(self) -> tuple[str, ...]:
        return self.rules.mesh_axes(self.axis)

    @property
    def automatic(self) -> set[str]:
        """The mesh axes left to the compiler; those of one device are not."""
        return {a for a in self.mesh.axis_names if self.mesh.shape[a] > 1} - set(self.row_axes)

    def __call__(self, function: Callable, in_specs, out_specs) -> Callable:
        """jax.shard_map of the function; specs may name the rows' mesh axes only."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.mesh.axis_names) - self.automatic,
            check_vma=False,
        )

    @property
    def rows(self) -> PartitionSpec:
        return self.rules.spec((self.axis,))

    def part(self, spec: PartitionSpec, automatic: bool = False) -> PartitionSpec:
        """What of a spec is over the manual axes, or over the others."""

        def of(axes: MeshAxes):
            return tuple(a for a in axis_names(axes) if (a in self.automatic) == automatic) or None

        return PartitionSpec(*map(of, spec))

    def on_own_part(self, function: Callable, in_specs, out_specs) -> Callable:
        """Inside: a function of every device's own part of arrays that the other axes split."""
        if not self.automatic:
            return function
        return jax.shard_map(
            function,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self.automatic,
            check_vma=False,
        )

    def whole(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Inside: what the manual axes split is put together; the gradient is summed and split.

        x may be a selection along dimensions that the other axes split (some tokens' columns of
        the head); where it does not divide over these it is taken whole.
        """
        split = [(dim, axes) for dim, axes in enumerate(self.part(spec)) if axes]
        if not split:
            return x

        def gather(x):
            for dim, axes in split:
                x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
            return x

        def divides(size: int, axes: MeshAxes) -> bool:
            return size % math.prod(self.mesh.shape[name] for name in axis_names(axes)) == 0

        automatic = zip(x.shape, self.part(spec, automatic=True), strict=False)
        kept = PartitionSpec(*(axes if divides(size, axes) else None for size, axes in automatic))
        return self.on_own_part(gather, kept, kept)(x)

    def sum(self, tree, specs):
        """Inside: sums over all rows of the devices' sums; leaves are split as their specs say.

        Leaves that are not split go in one collective: on CPU several in flight can starve each
        other of threads.
        """
        leaves, structure = jax.tree.flatten(tree)
        specs = structure.flatten_up_to(specs)
        together = [leaf for leaf, spec in zip(leaves, specs, strict=True) if not any(spec)]
        flat, unflatten = ravel_pytree(together)
        together = iter(unflatten(jax.lax.psum(flat, self.row_axes)))

        def summed(leaf, spec):
            if not any(spec):
                return next(together)
            # `whole` has summed over the axes that split the leaf.
            split = {name for axes in self.part(spec) for name in axis_names(axes)}
            left = tuple(a for a in self.row_axes if self.mesh.shape[a] > 1 and a not in split)
            if not left:
                return leaf
            kept = self.part(spec, automatic=True)
            return self.on_own_part(lambda x: jax.lax.psum(x, left), kept, kept)(leaf)

        return structure.unflatten(map(summed, leaves, specs))
