"""What an explanation says, as plain values.

A title's score is a product along its path through the trie. At every branch the LLM and the CF
model each have a distribution over the children; guidance lambda multiplies the two,

    guided(child) = llm(child) * cf(child) ** lambda / (the sum over the children),

and training pulls the LLM towards labels y = (1 - alpha) * onehot + alpha * cf (core/losses.py).
With the LLM in the place of the one-hot,

    mixed(child) = (1 - alpha) * llm(child) + alpha * cf(child).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Shares(NamedTuple):
    """Probabilities at a branch."""

    llm: float
    cf: float
    mixed: float
    guided: float


@dataclass(frozen=True)
class Child:
    """One way to go on at a branch.

    Attributes:
      text: of the tokens up to the next branch or the title's end; '' if nothing but the end.
      shares: of the branch.
      items: how many items that may be recommended are below.
      explained: the numbers, in Explanation.items, of those below.
      branch: the number of the branch that it leads to, if one of them passes there.
    """

    text: str
    shares: Shares
    items: int
    explained: tuple[int, ...]
    branch: int | None


@dataclass(frozen=True)
class Branch:
    """A prefix of titles and what may follow it.

    Attributes:
      prefix: the text so far.
      children: those on the paths of the explained items and the best others, best guided first.
      rest: all other children together, `rest_children` many with `rest_items` items.
      outside: of a softmax over the vocabulary, the tokens that no title goes on with which may be
        recommended; else 0.
    """

    prefix: str
    children: tuple[Child, ...]
    rest: Shares
    rest_children: int
    rest_items: int
    outside: Shares


@dataclass(frozen=True)
class Step:
    """A branch on the path of a title, and the child that is taken there; natural logarithms.

    Attributes:
      branch, child: numbers, in Explanation.branches and in Branch.children.
      llm, cf: log-probabilities of the child.
      forced: the LLM's of the tokens up to the next branch; 0 if the softmax is over the children.
    """

    branch: int
    child: int
    llm: float
    cf: float
    forced: float


@dataclass(frozen=True)
class ExplainedItem:
    """An item of the list, or one that was asked about.

    Attributes:
      item_id, title: as in the catalogue.
      place: from 1 on; None if it is not in the list.
      place_without: its place in the list without guidance; None if it is not in that.
      score: llm + cf.
      llm: what the LLM adds to the score: sum of (llm + forced) / tokens ** length_penalty.
      cf: what guidance adds: guidance * sum of cf / tokens ** length_penalty.
      tokens: of the title, its end included.
      steps: its path.
    """

    item_id: str
    title: str
    place: int | None
    place_without: int | None
    score: float
    llm: float
    cf: float
    tokens: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class HistoryItem:
    """An item of the history.

    Attributes:
      item_id, title: as in the catalogue.
      effects: of every explained item, its score less that after the history without this item
        (among the same items that may be recommended); () if that was not looked at.
    """

    item_id: str
    title: str
    effects: tuple[float, ...]


class Part(NamedTuple):
    """What the LLM and guidance add to a difference of scores."""

    llm: float
    cf: float


@dataclass(frozen=True)
class Comparison:
    """Why one item's score is greater than another's: the difference is the sum of three parts.

    Attributes:
      first, second: numbers in Explanation.items.
      prefix: the text that both titles begin with.
      branch: the number of the branch where they part; None for one title of two items.
      before: of the path up to there: 0 unless length_penalty divides it by different lengths.
      parting: at that branch.
      after: of what follows.
    """

    first: int
    second: int
    prefix: str
    branch: int | None
    before: Part
    parting: Part
    after: Part

    @property
    def difference(self) -> float:
        """Of the scores, the first's less the second's."""
        return sum(sum(part) for part in (self.before, self.parting, self.after))


@dataclass(frozen=True)
class Settings:
    """The numbers that scores and shares depend on; `mask` as in SearchConfig."""

    guidance: float
    alpha: float
    beta: float
    temperature: float
    length_penalty: float
    mask: str


@dataclass(frozen=True)
class Explanation:
    """Why a user's list is as it is.

    Attributes:
      settings: of scores and shares.
      history: oldest first.
      items: the list, best first, then the others that were asked about.
      without: the list without guidance, as (item id, title); () if there is no guidance.
      branches: what the paths of the items pass; the first is the beginning of all titles.
      comparisons: as asked for.
    """

    settings: Settings
    history: tuple[HistoryItem, ...]
    items: tuple[ExplainedItem, ...]
    without: tuple[tuple[str, str], ...]
    branches: tuple[Branch, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def listed(self) -> tuple[ExplainedItem, ...]:
        """The items of the list."""
        return tuple(one for one in self.items if one.place)

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, texts and finite numbers; every field by its name."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def compared(
    items: Sequence[ExplainedItem],
    branches: Sequence[Branch],
    settings: Settings,
    pair: tuple[int, int],
) -> Comparison:
    """The comparison of two explained items (numbers)."""
    first, second = (items[number] for number in pair)
    taken = zip(first.steps, second.steps, strict=False)
    apart = [(one.branch, one.child) != (two.branch, two.child) for one, two in taken]
    at = apart.index(True) if True in apart else len(apart)

    def part(start: int, stop: int | None) -> Part:
        one, two = (_sum_of(item, settings, start, stop) for item in (first, second))
        return Part(one.llm - two.llm, one.cf - two.cf)

    branch = first.steps[at].branch if at < len(apart) else None
    prefix = first.title if branch is None else branches[branch].prefix
    return Comparison(*pair, prefix, branch, part(0, at), part(at, at + 1), part(at + 1, None))


def _sum_of(item: ExplainedItem, settings: Settings, start: int, stop: int | None) -> Part:
    """What steps of its path add to an item's score."""
    steps, divisor = item.steps[start:stop], item.tokens**settings.length_penalty
    llm = sum(step.llm + step.forced for step in steps) / divisor
    return Part(llm, settings.guidance * sum(step.cf for step in steps) / divisor)
