"""The Collaborative Tokenizer's projection with the items split over the mesh.

The rows of a batch are on some mesh axes, the items on another (sharding.Rules): a device holds the
table rows of its items, makes their logits for its rows, and sums them up by trie node. Only the
few masses that decisions ask for are joined, never logits.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tca4rec_jax.batching import pad_rows
from tca4rec_jax.core.collaborative_tokenizer import CFItems, project
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.sharding import RULES


def item_axes(on_rows: DataParallel) -> tuple[str, ...]:
    """The mesh axes that split the items: those of the rule that split no rows."""
    return tuple(a for a in RULES.mesh_axes("items") if a in on_rows.automatic)


def item_shards(on_rows: DataParallel) -> int:
    """Into how many parts the items are split."""
    return math.prod(on_rows.mesh.shape[name] for name in item_axes(on_rows))


def cf_arrays(
    mesh: Mesh, items: CFItems | None, compressed: ItemTrie
) -> tuple[CFItems | None, DeviceTrie]:
    """The CF items and the trie on the host, padded so that the items divide over their axes."""
    trie = DeviceTrie.on_host(compressed, item_shards=item_shards(DataParallel(mesh)))
    return None if items is None else pad_items(items, trie), trie


def pad_items(items: CFItems, trie: DeviceTrie) -> CFItems:
    """The CF items on the host, as many as the trie's shards have together."""
    return jax.tree.map(lambda a: pad_rows(a, trie.item_order.shape[0]), items)


def cf_shardings(mesh: Mesh, items: CFItems | None, trie: DeviceTrie):
    """The shardings of padded (items, trie), which may be abstract."""
    specs = _specs(item_axes(DataParallel(mesh)), items, trie)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _specs(axes: tuple[str, ...], items: CFItems | None, trie: DeviceTrie):
    split = PartitionSpec(axes) if axes else PartitionSpec()
    of_items = jax.tree.map(lambda _: split, items)
    of_trie = jax.tree.map(lambda _: PartitionSpec(), trie)
    return of_items, dataclasses.replace(of_trie, item_order=split, ordered_leaf=split)


def project_shards(
    on_rows: DataParallel,
    cf_PxD: jax.Array,
    items: CFItems,
    pair_K: jax.Array,
    node_K: jax.Array,
    trie: DeviceTrie,
    beta: jax.Array | float,
) -> jax.Array:
    """`project` inside on_rows, of items and trie from `cf_arrays` where `cf_shardings` says."""
    axes = item_axes(on_rows)
    if not axes:
        return project(cf_PxD, items, pair_K, node_K, trie, beta)
    everywhere = cf_spec = PartitionSpec()
    if items.table_IxD is None:  # cf_PxD are logits
        cf_PxD = jnp.pad(cf_PxD, ((0, 0), (0, trie.item_order.shape[0] - cf_PxD.shape[1])))
        cf_spec = PartitionSpec(None, axes)
    items_specs, trie_specs = _specs(axes, items, trie)
    in_specs = cf_spec, items_specs, everywhere, everywhere, trie_specs, everywhere
    on_shard = on_rows.on_own_part(partial(project, axis_name=axes), in_specs, everywhere)
    return on_shard(cf_PxD, items, pair_K, node_K, trie, beta)
