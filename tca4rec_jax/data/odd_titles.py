"""What is legal about the titles of a catalogue, and seldom meant."""

import re
from collections import Counter
from collections.abc import Sequence

_MARKUP = re.compile(r"&(?:[a-zA-Z]\w*|#\d+|#x[0-9a-fA-F]+);|</?[a-zA-Z][^<>]*>")
_MISSING = {"nan", "none", "null"}


def odd_titles(whole: Sequence[str], cut: Sequence[str]) -> list[str]:
    """A sentence for each oddity of the titles as they came, and as they are cut."""
    notes = []
    if markup := [title for title in whole if _MARKUP.search(title)]:
        notes.append(f"{len(markup)} titles hold HTML entities or tags, such as {markup[0]!r}")
    if missing := [title for title in whole if title.casefold() in _MISSING]:
        notes.append(f"{len(missing)} titles are {missing[0]!r} or the like: missing values?")
    [(worst, most)] = (counts := Counter(whole)).most_common(1)
    if most > 1:
        shared = sum(count for count in counts.values() if count > 1)
        notes.append(f"{shared} items share their title with another, {most} of them {worst!r}")
    counts_cut = Counter(cut)
    if merged := len(counts) - len(counts_cut):
        sources: dict[str, str] = {}
        pairs = (
            (sources.setdefault(short, title), title)
            for title, short in zip(whole, cut, strict=True)
        )
        first, second = next(pair for pair in pairs if pair[0] != pair[1])
        notes.append(
            f"data.max_title_length made {merged} distinct titles equal to another, such as "
            f"{second!r} to {first!r}: raise it, or 0 keeps titles whole"
        )
    return notes
