"""The Collaborative Tokenizer in a beam search whose model is split over the mesh.

As in training (sharded_projection.py) a device makes the CF logits of its own items and sums them
up by trie node. Joined, these masses are split by node, and so is a large trie. The search does not
know: what it looks up at a node comes from the device that has it, by a sum over the devices that
the compiler puts in.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.batching import pad_rows, round_up
from tca4rec_jax.core.collaborative_tokenizer import CFItems, node_log_mass
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.sharded_projection import item_axes, item_shards, pad_items
from tca4rec_jax.distributed.sharding import put, sharding_of

# Nodes, 2 GB: of a smaller trie every device holds all, and asks nobody. Of as many masses those of
# one user after the other are made.
SPLIT_FROM = 1 << 24


# What a DeviceTrie has besides arrays by node and by token of an edge, and how it is split.
_OTHERS = {"choice": None, "item_order": "items", "ordered_leaf": "items"}


def put_trie(mesh: Mesh, trie: DeviceTrie) -> DeviceTrie:
    """A trie from the host, of one item shard or of `search_shards`, where a search has it."""
    parts = search_shards(mesh)

    def padded(path, array: np.ndarray) -> np.ndarray:
        whole = path[0].name in _OTHERS
        return array if whole else pad_rows(array, round_up(len(array), parts))

    trie = jax.tree_util.tree_map_with_path(padded, trie)
    return put(trie, trie_shardings(mesh, trie))


def put_items(mesh: Mesh, items: CFItems, trie: DeviceTrie) -> CFItems:
    """CF items from the host, where a search with this trie has them."""
    items = pad_items(items, trie)
    return put(items, item_shardings(mesh, items))


def search_shards(mesh: Mesh) -> int:
    """Into how many parts the items of a search are split."""
    return item_shards(DataParallel(mesh, "prompts"))


def item_shardings(mesh: Mesh, items: CFItems) -> CFItems:
    """Where the padded CF items of a search live; they may be abstract."""

    def of_items(array):
        return sharding_of(mesh, ("items", *[None] * (array.ndim - 1)), array.shape)

    return jax.tree.map(of_items, items)


def trie_shardings(mesh: Mesh, trie: DeviceTrie) -> DeviceTrie:
    """Where the padded trie of a search lives; it may be abstract."""
    of_node = "items" if trie.sizes.num_nodes >= SPLIT_FROM else None

    def of_trie(path, array):
        return sharding_of(mesh, (_OTHERS.get(path[0].name, of_node),), array.shape)

    return jax.tree_util.tree_map_with_path(of_trie, trie)


def sharded_log_mass(
    on_prompts: DataParallel, logits_BxI: jax.Array, trie: DeviceTrie, beta: jax.Array | float
) -> jax.Array:
    """`node_log_mass` inside on_prompts, of a trie from `put_trie`: float32 [B, N padded].

    The logits are of as many items as `put_items` has.
    """
    axes, shards = item_axes(on_prompts), item_shards(on_prompts)
    if not axes:
        return node_log_mass(logits_BxI, trie, beta)
    everywhere, of_items = PartitionSpec(), PartitionSpec(axes)

    def on_shard(logits_BxI, item_order, ordered_leaf, parent, leaf, beta):
        arrays = {"item_order": item_order, "ordered_leaf": ordered_leaf}
        own = dataclasses.replace(trie, **arrays, parent=parent, leaf=leaf)

        def mass_of(logits_BxI):
            mass_BxN = node_log_mass(logits_BxI, own, beta)
            padding = ((0, 0), (0, parent.shape[0] - mass_BxN.shape[1]))
            mass_BxN = jnp.pad(mass_BxN, padding, constant_values=-jnp.inf)
            return _joined(mass_BxN, axes, shards)

        if logits_BxI.shape[0] * parent.shape[0] < SPLIT_FROM:
            return mass_of(logits_BxI)
        return jax.lax.map(lambda logits_I: mass_of(logits_I[None])[0], logits_BxI)

    specs = PartitionSpec(None, axes), of_items, of_items, everywhere, everywhere, everywhere
    run = on_prompts.on_own_part(on_shard, specs, PartitionSpec(None, axes))
    beta = jnp.asarray(beta, jnp.float32)
    return run(logits_BxI, trie.item_order, trie.ordered_leaf, trie.parent, trie.leaf, beta)


def _joined(mass_BxN: jax.Array, axes: tuple[str, ...], shards: int) -> jax.Array:
    """log of the devices' summed masses; of each device its own part of the nodes."""
    mass_BxSxn = mass_BxN.reshape(mass_BxN.shape[0], shards, -1)
    mass_BxSxn = jax.lax.all_to_all(mass_BxSxn, axes, split_axis=1, concat_axis=1, tiled=True)
    return jax.nn.logsumexp(mass_BxSxn, axis=1)
