"""The sizes of a catalogue's tries, without a catalogue: shapes to compile for.

Titles of 9,913 office products (Amazon 2018, at most 100 characters, SmolLM2's tokens) give the
proportions; what grows more slowly than the number of items does so with the exponents found
between them and 20,669 toys.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tca4rec_jax.core.trie import DeviceTrie, TrieSizes

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
        """The number of choice tokens U, as measured tries grow with their items."""
        growth = self.items / _MEASURED_ITEMS
        return min(int(_CHOICES * growth**_CHOICE_EXPONENT), self.vocabulary)

    def trie(self, *, score_edges: bool = False) -> DeviceTrie:
        """What DeviceTrie.of gives of the compressed trie."""
        nodes = sum(self.levels)
        sizes = {
            "choice": self.choices,
            "edge_tokens": int(_TOKENS_PER_EDGE * nodes),
            **dict.fromkeys(("item_order", "ordered_leaf"), self.items),
        }
        arrays: dict[str, Any] = {
            field.name: jax.ShapeDtypeStruct((sizes.get(field.name, nodes),), jnp.int32)
            for field in dataclasses.fields(DeviceTrie)
        }
        inner = int(_INNER_CHILDREN * self.items / _MEASURED_ITEMS)
        static = TrieSizes(
            num_leaves=self.items,
            level_offsets=tuple(itertools.accumulate(self.levels, initial=0)),
            root_children=self.levels[1],
            inner_children=max(1, min(inner, self.levels[1])),
            longest_run=TITLE_TOKENS - 1 if score_edges else 20,
            longest_path=TITLE_TOKENS - 1 if score_edges else 22,
            beam_reads=309 if score_edges else 112,
        )
        return DeviceTrie(**arrays | {"sizes": static})
