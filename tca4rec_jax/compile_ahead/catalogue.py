"""The sizes of a catalogue's tries and CF logits, without a catalogue: shapes to compile for.

Titles of 9,913 office products (Amazon 2018, at most 100 characters, SmolLM2's tokens) give the
proportions; what grows more slowly than the number of items does so with the exponents found
between them and 20,669 toys.

Axis letters: I items, N nodes of the compressed trie, F tokens of all edges, U tokens that some
node chooses from, D CF width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tca4rec_jax.core.collaborative_tokenizer import CFItems, TrieArrays, TrieShape
from tca4rec_jax.decoding.search_trie import SearchShape, SearchTrie

_MEASURED_ITEMS = 9913
_LEVELS = (1075, 2826, 3443, 2597, 1649, 892, 414, 132, 41, 9, 2)  # nodes below the root
_ROOT_EXPONENT, _CHOICE_EXPONENT = 0.43, 0.65
_CHOICES, _INNER_CHILDREN = 2873, 109
_TOKENS_PER_EDGE = 9.5
TITLE_TOKENS, DECISIONS = 71, 11  # the longest, the most


@dataclass(frozen=True)
class CatalogueSizes:
    """Of a catalogue of `items` titles for a tokenizer of `vocabulary` tokens."""

    items: int
    vocabulary: int

    @property
    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the compressed trie."""
        growth = self.items / _MEASURED_ITEMS
        root = min(int(_LEVELS[0] * growth**_ROOT_EXPONENT), self.vocabulary, self.items)
        below = max(sum(_LEVELS) * growth - root, 1) / sum(_LEVELS[1:])
        return (1, root, *(max(1, int(size * below)) for size in _LEVELS[1:]))

    @property
    def choices(self) -> int:
        growth = self.items / _MEASURED_ITEMS
        return min(int(_CHOICES * growth**_CHOICE_EXPONENT), self.vocabulary)

    def items_side(self, width: int) -> CFItems:
        """Factorised CF logits: float32 item vectors [I, D] and no bias."""
        return CFItems(_array(jnp.float32, self.items, width), None)

    def trie(self) -> tuple[TrieArrays, TrieShape]:
        """What trie_on_device gives."""
        nodes = sum(self.levels)
        of_nodes = {
            name: _array(jnp.int32, nodes)
            for name in ("leaf", "parent", "child_start", "child_count", "token", "choice_index")
        }
        arrays = TrieArrays(
            item_order=_array(jnp.int32, self.items),
            ordered_leaf=_array(jnp.int32, self.items),
            choice=_array(jnp.int32, self.choices),
            **of_nodes,
        )
        offsets = [0]
        for size in self.levels:
            offsets.append(offsets[-1] + size)
        return arrays, TrieShape(self.items, self.levels[1], tuple(offsets))

    def search_trie(self, *, score_edges: bool) -> tuple[SearchTrie, SearchShape]:
        """What search_trie(compress=True) gives."""
        mass, mass_shape = self.trie()
        nodes = sum(self.levels)
        fields = {name: _array(jnp.int32, nodes) for name in SearchTrie._fields if name != "mass"}
        fields["edge_tokens"] = _array(jnp.int32, int(_TOKENS_PER_EDGE * nodes))
        fields["choice"] = _array(jnp.int32, self.choices)
        inner = int(_INNER_CHILDREN * self.items / _MEASURED_ITEMS)
        shape = SearchShape(
            root_children=self.levels[1],
            inner_children=max(1, min(inner, self.levels[1])),
            longest_run=TITLE_TOKENS - 1 if score_edges else 20,
            suffix_size=TITLE_TOKENS - 1 if score_edges else 22,
            beam_reads=309 if score_edges else 112,
            mass=mass_shape,
        )
        return SearchTrie(**fields, mass=mass), shape


def _array(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
