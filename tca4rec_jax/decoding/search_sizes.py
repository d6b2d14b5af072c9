"""The static sizes that a search is compiled for, and the constants that they follow from.

The constants were measured on two CPU cores with SmolLM2-135M. They decide how long a search takes
to compile and to run, never what it finds.
"""

import math

FEWEST_TOKENS = 40  # A call with fewer is hardly faster: it waits for the weights.
# At most this many tokens per beam of a user in one call: longer edges take several calls, and the
# attention of a call has less filler.
TOKENS_PER_BEAM = 2
# Sizes of the calls, in tokens per beam of the batch. The first serves the step after the prompt,
# when every beam has an edge to read; the last the end of a batch, when most users are done.
CALL_SIZES = (5 / 4, 3 / 4, 3 / 8, 1 / 8)
# Users have unequal shares of a call: attention makes room for so many times the mean.
UNEVEN_SHARE = 1.6
FIRST_POOL_SLOTS = 8  # per beam, of the smallest pool; the next are four times larger each
# Of texts that a CPU reads at one time: what a layer makes of them stays in its caches.
TEXT_TOKENS = 640
VOCABULARY_BYTES = 256 << 20  # bounds the vocabulary logits that exist at one time
FIRST_CHILDREN = 16  # of the smallest expansion of a step; the next are eight times larger each


def call_sizes(batch: int, beams: int, edge_chunk: int) -> list[tuple[int, int]]:
    """(tokens, most tokens of one user) of the calls that are compiled, ascending.

    A smaller one is taken only if all tokens fit; the largest leaves the others to the next call.
    """
    per_user = beams * min(edge_chunk, TOKENS_PER_BEAM)
    sizes: list[int] = []
    for size in CALL_SIZES:
        tokens = min(max(math.ceil(batch * beams * size), FEWEST_TOKENS), batch * per_user)
        if not sizes or sizes[0] >= 1.5 * tokens:  # else it is not worth a program of its own
            sizes.insert(0, tokens)
    return [(tokens, min(math.ceil(UNEVEN_SHARE * tokens / batch), per_user)) for tokens in sizes]


def pool_capacities(beams: int, most_reads: int) -> list[int]:
    """Slots of a user's pool, ascending: every query looks at all slots, taken or not.

    The search is compiled once for each capacity, so one has to save half of the slots. The last
    one suffices if the LLM reads at most `most_reads` tokens for one beam.
    """
    largest = beams * most_reads
    capacities = (beams * FIRST_POOL_SLOTS << 2 * n for n in range(16))
    return [*(capacity for capacity in capacities if 2 * capacity <= largest), largest]


def children_bounds(largest: int) -> list[int]:
    """Numbers of children, ascending; a step takes the smallest that holds those of its nodes."""
    bounds = [bound for bound in (FIRST_CHILDREN << 3 * n for n in range(8)) if bound < largest]
    return [*bounds, largest]


def rows_at_once(batch: int, length: int) -> int:
    """How many rows of a batch, a divisor of it, a CPU reads at one time: TEXT_TOKENS or fewer."""
    most = max(1, TEXT_TOKENS // length)
    return max(rows for rows in range(1, most + 1) if batch % rows == 0)


def states_at_once(states: int, logits: int) -> int:
    """Of how many states, at least one, the float32 logits (so many each) exist at one time."""
    return min(states, max(1, VOCABULARY_BYTES // (4 * logits)))
