"""The item side of the CF logits, split over the mesh.

The rows of a batch are on some mesh axes, the items on another (sharding.Rules): a device holds the
table rows of its items, makes their logits for its rows, and sums them up by trie node; what is
joined are the few masses that decisions ask for, never logits.

Axis letters: P pairs, I items, K decisions, C children, D CF width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tca4rec_jax.core.collaborative_tokenizer import (
    CFItems,
    TrieArrays,
    TrieShape,
    project,
    shard_items,
    trie_on_device,
)
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.distributed.data_parallel import RowParallel
from tca4rec_jax.distributed.sharding import put


def _item_axes(on_rows: RowParallel) -> tuple[str, ...]:
    """The mesh axes that split the items: those of the rule that split no rows."""
    return tuple(a for a in on_rows.rules.mesh_axes("items") if a in on_rows.automatic)


def cf_arrays(
    mesh: Mesh, items: CFItems | None, trie: ItemTrie
) -> tuple[CFItems | None, TrieArrays, TrieShape]:
    """What the training step takes of the CF items and of the compressed trie, padded to divide."""
    num_shards = math.prod(mesh.shape[name] for name in _item_axes(RowParallel(mesh)))
    arrays, shape = trie_on_device(trie) if num_shards == 1 else shard_items(trie, num_shards)
    missing = arrays.item_order.shape[0] - trie.num_items
    items = jax.tree.map(lambda a: np.pad(a, ((0, missing),) + ((0, 0),) * (a.ndim - 1)), items)
    return items, arrays, shape


def cf_shardings(mesh: Mesh, items: CFItems | None, trie: TrieArrays):
    """The shardings of (items, trie) of cf_arrays, which may be abstract."""
    specs = _specs(_item_axes(RowParallel(mesh)))
    return tuple(
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), jax.tree.broadcast(spec, tree))
        for spec, tree in zip(specs, (items, trie), strict=True)
    )


def _specs(axes: tuple[str, ...]) -> tuple[PartitionSpec, TrieArrays]:
    """Of CFItems (each of its arrays) and of TrieArrays."""
    split, everywhere = PartitionSpec(*([axes] if axes else [])), PartitionSpec()
    arrays = TrieArrays(*[everywhere] * len(TrieArrays._fields))
    return split, arrays._replace(item_order=split, ordered_leaf=split)


def put_cf(
    mesh: Mesh, items: CFItems | None, trie: ItemTrie
) -> tuple[CFItems | None, TrieArrays, TrieShape]:
    """`cf_arrays` on the mesh."""
    *arrays, shape = cf_arrays(mesh, items, trie)
    return *put(tuple(arrays), cf_shardings(mesh, *arrays)), shape


def project_shards(
    on_rows: RowParallel,
    cf_PxD: jax.Array,
    items: CFItems,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: TrieArrays,
    shape: TrieShape,
    beta: jax.Array | float,
):
    """`collaborative_tokenizer.project` inside on_rows, of items and trie from cf_arrays."""
    axes = _item_axes(on_rows)
    if not axes:
        return project(cf_PxD, items, pair_K, node_K, trie, shape, beta)
    dense = items.table_IxD is None
    if dense:
        missing = trie.item_order.shape[0] - cf_PxD.shape[1]
        cf_PxD = jnp.pad(cf_PxD, ((0, 0), (0, missing)))
    everywhere = PartitionSpec()
    items_spec, trie_specs = _specs(axes)
    cf_spec = PartitionSpec(None, axes) if dense else everywhere
    on_shard = on_rows.on_own_part(
        lambda cf, items, pair, node, trie, beta: project(
            cf, items, pair, node, trie, shape, beta, axis_name=axes
        ),
        in_specs=(cf_spec, items_spec, everywhere, everywhere, trie_specs, everywhere),
        out_specs=everywhere,
    )
    return on_shard(cf_PxD, items, pair_K, node_K, trie, beta)
