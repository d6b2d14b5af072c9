"""The LLM along the paths of given titles: the logits of the children of every node they pass.

A search finds a list; this reads the titles of one again, with all that was to choose from. Titles
that begin alike share what is read, as in a search: the nodes of a level are its beams.

Axes: core/__init__.py; here L are the trie's levels below the root, and M the nodes of a level.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tca4rec_jax.core import Array
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie
from tca4rec_jax.decoding.advance_beams import EdgeReader, EdgeScores, Prompts
from tca4rec_jax.decoding.beam_search import SearchConfig
from tca4rec_jax.decoding.search_sizes import pool_capacities
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.llm.kv_cache import gather_beams


class TitlePaths(NamedTuple):
    """The nodes of a compressed trie that titles pass, level by level below the root."""

    node_LxM: Array  # int32, ascending; 0 (the root) where a level has no more
    parent_LxM: Array  # int32, the place of the node's parent in the level above

    @classmethod
    def of(cls, trie: ItemTrie, leaves: np.ndarray) -> "TitlePaths":
        """Of the titles of some leaves (int); as wide as the next power of two."""
        levels = [np.unique(level[level >= 0]) for level in trie.paths_QxK[leaves].T]
        width = 1 << (len(leaves) - 1).bit_length()
        node_LxM, parent_LxM = np.zeros((2, len(levels) - 1, width), np.int32)
        for at, (above, nodes) in enumerate(zip(levels, levels[1:], strict=False)):
            node_LxM[at, : nodes.size] = nodes
            parent_LxM[at, : nodes.size] = np.searchsorted(above, trie.parent[nodes])
        return cls(node_LxM, parent_LxM)

    def pool_slots(self, trie: DeviceTrie) -> int:
        """The smallest of the search's pools that holds every token of these nodes."""
        capacities = pool_capacities(self.node_LxM.shape[1], trie.sizes.beam_reads)
        needed = int(_tokens_read(trie.run_length, self.node_LxM))
        return next(capacity for capacity in capacities if capacity >= needed)


@jax.jit
def _tokens_read(run_length_N: jax.Array, node_LxM: jax.Array) -> jax.Array:
    """On the devices, which may hold a part of the nodes each."""
    return jnp.sum(run_length_N[node_LxM])


class NodeScores(NamedTuple):
    """What the LLM says after nodes [..., M]; float32, logits divided by the temperature."""

    child_BxMxC: Array  # logits of the children's first tokens; undefined where there is no child
    norm_BxM: Array  # log sum exp over the vocabulary; 0 if the softmax is over the children
    forced_BxM: Array  # summed log-probabilities of the edge's tokens but the first; 0 likewise


class TitleScores(NamedTuple):
    """`NodeScores` of the root, [B, 1, ..], and of the nodes of TitlePaths, [B, L, M, ..]."""

    root: NodeScores
    inner: NodeScores


def read_titles(
    model: Decoder,
    prompts: Prompts,
    trie: DeviceTrie,
    temperature: float | jax.Array,
    paths: TitlePaths,
    config: SearchConfig,
    slots: int,
) -> TitleScores:
    """Reads titles after prompts that have been read; traceable.

    `trie` and `config` are those of a search with the rules 'exact'; `slots` is
    `paths.pool_slots(trie)`.
    """
    batch, width = prompts.length_B.shape[0], paths.node_LxM.shape[1]
    edge_chunk = min(config.edge_chunk, trie.sizes.longest_run)
    reader = EdgeReader(model, prompts, trie, temperature, config.vocabulary, edge_chunk)

    def scores_at(children: int, node_BxM: jax.Array, scores: EdgeScores) -> NodeScores:
        child_BxMxC, _ = trie.children(node_BxM, children)
        index_BxMxC = trie.choice_index[child_BxMxC]
        logit_BxMxC = jnp.take_along_axis(scores.choice_BxMxU, index_BxMxC, axis=-1)
        return NodeScores(logit_BxMxC, scores.norm_BxM, scores.forced_BxM)

    def next_level(cache, level):
        node_BxM, parent_BxM = (jnp.tile(one_M[None, :], (batch, 1)) for one_M in level)
        scores, cache, _ = reader.advance(node_BxM, gather_beams(cache, parent_BxM))
        return cache, scores_at(trie.sizes.inner_children, node_BxM, scores)

    root_Bx1 = jnp.zeros((batch, 1), jnp.int32)
    root = scores_at(trie.sizes.root_children, root_Bx1, reader.after_prompts())
    cache = model.init_beam_cache(batch, width, slots)
    _, levels = jax.lax.scan(next_level, cache, (paths.node_LxM, paths.parent_LxM))
    return TitleScores(root, jax.tree.map(partial(jnp.swapaxes, axis1=0, axis2=1), levels))
