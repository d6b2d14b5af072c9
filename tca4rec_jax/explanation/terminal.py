"""An explanation as lines of a terminal, 80 columns wide."""

from collections.abc import Iterator

from rich.cells import set_cell_size

from tca4rec_jax.explanation.explanation import Branch, Child, Explanation, Shares
from tca4rec_jax.terminal import plain_text

_WIDTH = 80
_NARROWEST = 8  # that a text deep in the tree is cut to, beyond the width if need be
_MOST_COLUMNS = 8  # of effects; the JSON file has all


def explanation_lines(explanation: Explanation) -> Iterator[str]:
    """The list, its decoding tree, the effects of the history, the comparisons."""
    yield from _list_lines(explanation)
    yield from _tree_lines(explanation)
    yield from _effect_lines(explanation)
    yield from _comparison_lines(explanation)


def _cut(text: str, width: int) -> str:
    """A user's text in so many columns, with an ellipsis if it is longer."""
    text = plain_text(text.strip())
    fitted = set_cell_size(text, width).rstrip()
    return fitted if fitted == text else set_cell_size(text, width - 1).rstrip() + "…"


def _list_lines(explanation: Explanation) -> Iterator[str]:
    guidance = explanation.settings.guidance
    yield f"The list: score = LLM + {guidance:g} x CF, logarithms of probabilities"
    yield " place  without    score      LLM       CF  title"
    for item in explanation.listed:
        without = "-" if item.place_without is None else str(item.place_without)
        without = without if guidance else ""
        numbers = f"{item.score:9.3f}{item.llm:9.3f}{item.cf:9.3f}"
        yield f"{item.place:6d}{without:>9s}{numbers}  {_cut(item.title, _WIDTH - 44)}"
    listed = {item.item_id for item in explanation.listed}
    gone = [title for item_id, title in explanation.without if item_id not in listed]
    if gone:
        yield "Only without guidance:"
        yield from (f"    {_cut(title, _WIDTH - 4)}" for title in gone)


def _tree_lines(explanation: Explanation) -> Iterator[str]:
    settings = explanation.settings
    yield ""
    yield "The decoding tree: how each prefix goes on, in percent"
    weights = f"{1 - settings.alpha:.3g} LLM + {settings.alpha:.3g} CF"
    yield f"  mix = {weights}, as in training; guided = LLM x CF^{settings.guidance:g}"
    yield "   LLM    CF   mix guided"
    yield from _branch_lines(explanation, 0, "")


def _numbers(shares: Shares) -> str:
    llm, cf, mixed, guided = (100 * share for share in shares)
    return f"{llm:6.1f}{cf:6.1f}{mixed:6.1f}{guided:7.1f}  "


def _branch_lines(explanation: Explanation, number: int, indent: str) -> Iterator[str]:
    branch = explanation.branches[number]
    rows: list[tuple[Shares, str, Child | None]] = [
        (child.shares, _child_text(explanation, child), child) for child in branch.children
    ]
    if branch.rest_children:
        counts = counted(branch.rest_children, "other"), counted(branch.rest_items, "item")
        rows.append((branch.rest, f"({', '.join(counts)})", None))
    if is_open(branch):
        rows.append((branch.outside, "(no title that may follow)", None))
    if (forced := forced_branch(branch)) is not None:
        yield from _branch_lines(explanation, forced, indent)
        return
    for at, (shares, text, child) in enumerate(rows):
        last = at == len(rows) - 1
        numbers = _numbers(shares) + indent + ("└ " if last else "├ ")
        yield numbers + _cut(text, max(_WIDTH - len(numbers), _NARROWEST))
        if child is not None and child.branch is not None:
            yield from _branch_lines(explanation, child.branch, indent + ("  " if last else "│ "))


def counted(count: int, noun: str) -> str:
    """'1 item', '2 items'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_open(branch: Branch) -> bool:
    """Whether something is likely at a branch that is none of its children."""
    return branch.outside.llm > 1e-6


def forced_branch(branch: Branch) -> int | None:
    """The branch that this one only leads on to, where there is nothing to choose."""
    alone = len(branch.children) == 1 and not branch.rest_children and not is_open(branch)
    return branch.children[0].branch if alone else None


def _child_text(explanation: Explanation, child: Child) -> str:
    if child.branch is None and child.explained:
        places = [explanation.items[number].place for number in child.explained]
        ranks = ", ".join(f"#{place}" if place else "not in the list" for place in places)
        return f"[{ranks}] {child.text.strip() or '(end)'}"
    items = f" ({counted(child.items, 'item')})" if child.items > 1 else ""
    return f"{child.text.strip() or '(end)'}{items}"


def _effect_lines(explanation: Explanation) -> Iterator[str]:
    if not any(item.effects for item in explanation.history):
        return
    places = range(min(len(explanation.listed), _MOST_COLUMNS))
    width = _WIDTH - 7 * len(places)
    yield ""
    yield "The history: what each item adds to the score of the listed ones"
    yield "".ljust(width) + "".join(f"{f'#{place + 1}':>7s}" for place in places)
    for item in explanation.history:
        effects = "".join(f"{item.effects[place]:+7.2f}" for place in places)
        yield _cut(item.title, width - 1).ljust(width) + effects


def _comparison_lines(explanation: Explanation) -> Iterator[str]:
    for one in explanation.comparisons:
        first, second = (explanation.items[number] for number in (one.first, one.second))
        stands = "before" if one.difference >= 0 else "after"
        titles = [_cut(item.title, 22) for item in (first, second)]
        yield ""
        yield f"Why {titles[0]!r} stands {stands} {titles[1]!r}: {one.difference:+.3f}"
        if one.branch is None:
            yield "  They have one title."
            continue
        yield f"{'':48s}    LLM      CF"
        prefix = _cut(one.prefix, 30)
        parts = {
            "before they part": one.before,
            f"where they part, after {prefix!r}" if prefix else "at the first choice": one.parting,
            "after that": one.after,
        }
        for text, part in parts.items():
            if part is one.parting or max(map(abs, part)) > 1e-6:
                yield f"  {_cut(text, 44).ljust(44)}  {part.llm:+7.3f} {part.cf:+7.3f}"
