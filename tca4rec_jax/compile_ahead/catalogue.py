"""The sizes of a catalogue's tries, without a catalogue: shapes to compile for.

Titles of 9,913 office products (Amazon 2018, at most 100 characters, SmolLM2's tokens) give the
proportions; what grows more slowly than the number of items does so with the exponents found
between them and 20,669 toys. Semantic ids are those of 12,101 beauty products (four levels of 256),
the exponents found between them and 3,000 of these. Of a recommender that answers Yes or No the
trie has two leaves.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tca4rec_jax.batching import round_up
from tca4rec_jax.core.trie import DeviceTrie, ItemTrie, TrieSizes


@dataclass(frozen=True)
class Measured:
    """What was measured of a real catalogue."""

    items: int
    levels: tuple[int, ...]  # nodes of the compressed trie below the root
    root_exponent: float
    choices: int
    choice_exponent: float
    inner_children: int  # most children of a node below the root
    tokens_per_edge: float
    tokens: int  # of an item, at most
    decisions: int  # of an item, at most
    tokens_per_item: int  # of one in a sequence
    decisions_per_item: int
    # longest run, longest path, beam reads of TrieSizes; and the same if edges are scored.
    reads: tuple[int, int, int]
    scored_reads: tuple[int, int, int]


TITLES = Measured(
    items=9913,
    levels=(1075, 2826, 3443, 2597, 1649, 892, 414, 132, 41, 9, 2),
    root_exponent=0.43,
    choices=2873,
    choice_exponent=0.65,
    inner_children=109,
    tokens_per_edge=9.5,
    tokens=71,
    decisions=11,
    tokens_per_item=12,
    decisions_per_item=4,
    reads=(20, 22, 112),
    scored_reads=(70, 70, 309),
)
IDS = Measured(
    items=12101,
    levels=(197, 7916, 6066, 532),
    root_exponent=0.12,
    choices=933,
    choice_exponent=0.19,
    inner_children=199,
    tokens_per_edge=2.2,
    tokens=4,
    decisions=4,
    tokens_per_item=4,
    decisions_per_item=3,
    reads=(2, 3, 5),
    scored_reads=(3, 3, 6),
)
ID_TOKENS = 4 * 256  # new tokens of the vocabulary


@dataclass(frozen=True)
class CatalogueSizes:
    """Of a catalogue of `items`, for a tokenizer of `vocabulary` tokens."""

    items: int
    vocabulary: int
    measured: Measured = TITLES

    @property
    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the compressed trie."""
        measured, growth = self.measured.levels, self.items / self.measured.items
        grown = int(measured[0] * growth**self.measured.root_exponent)
        root = min(grown, self.vocabulary, self.items)
        below = max(sum(measured) * growth - root, 1) / sum(measured[1:])
        return (1, root, *(max(1, int(size * below)) for size in measured[1:]))

    @property
    def choices(self) -> int:
        """The number of choice tokens U, as measured tries grow with their items."""
        growth = self.items / self.measured.items
        grown = int(self.measured.choices * growth**self.measured.choice_exponent)
        return min(grown, self.vocabulary)

    def trie(self, *, score_edges: bool = False, parts: int = 1) -> DeviceTrie:
        """What DeviceTrie.of gives of the compressed trie, padded to be split in so many parts."""
        measured, nodes = self.measured, sum(self.levels)
        sizes = {
            "edge_tokens": int(measured.tokens_per_edge * nodes),
            **dict.fromkeys(("item_order", "ordered_leaf"), self.items),
        }
        names = [field.name for field in dataclasses.fields(DeviceTrie)]
        length = {name: round_up(sizes.get(name, nodes), parts) for name in names}
        length["choice"] = self.choices
        arrays: dict[str, Any] = {
            name: jax.ShapeDtypeStruct((length[name],), jnp.int32) for name in names
        }
        inner = int(measured.inner_children * self.items / measured.items)
        run, path, reads = measured.scored_reads if score_edges else measured.reads
        static = TrieSizes(
            num_leaves=self.items,
            level_offsets=tuple(itertools.accumulate(self.levels, initial=0)),
            root_children=self.levels[1],
            inner_children=max(1, min(inner, self.levels[1])),
            longest_run=run,
            longest_path=path,
            beam_reads=reads,
        )
        return DeviceTrie(**arrays | {"sizes": static})


@dataclass(frozen=True)
class AnswerSizes:
    """Of two answers of one token each, in the place of a catalogue; padded over `devices`."""

    devices: int
    vocabulary: int

    @property
    def items(self) -> int:
        """The number of answers, padded."""
        return round_up(2, self.devices)

    def trie(self, *, score_edges: bool = False, parts: int = 1) -> DeviceTrie:
        """As of CatalogueSizes."""
        answers = ItemTrie.build([[0], [1]]).compress()
        made = DeviceTrie.on_host(answers, item_shards=self.devices, score_edges=score_edges)

        def padded(path, array) -> Any:
            length = len(array) if path[0].name == "choice" else round_up(len(array), parts)
            return jax.ShapeDtypeStruct((length,), jnp.int32)

        return jax.tree_util.tree_map_with_path(padded, made)
