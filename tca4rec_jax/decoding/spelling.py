"""What is spelt like an unknown name: quick among millions, and never long without a pause."""

import heapq
import itertools
from collections.abc import Sequence
from functools import partial

from rapidfuzz import fuzz, process

_LONGEST = 200  # characters of a name that are compared, and shown
_AT_ONCE = 1 << 16  # names; other threads may run after so many


def hint(name: str, known: Sequence[str]) -> str:
    """'; did you mean 'A' or 'B'?', of the three most similar; '' if none is similar by half."""
    best = partial(process.extract, name[:_LONGEST], scorer=fuzz.ratio, limit=3, score_cutoff=50)
    parts = (known[start : start + _AT_ONCE] for start in range(0, len(known), _AT_ONCE))
    found = itertools.chain.from_iterable(map(best, parts))
    near = [text for text, *_ in heapq.nlargest(3, found, key=lambda one: one[1])]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def shown(name: str) -> str:
    """A name in quotes, no longer than a line."""
    return repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…")
