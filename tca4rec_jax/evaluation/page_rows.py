"""Sections of an evaluation's page about single rows: ranks side by side, examples, errors.

Axis letters: R rows, M places of a list.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tca4rec_jax.evaluation.kept_rankings import Ranks, hit_ranks
from tca4rec_jax.evaluation.pictures import counts_figure
from tca4rec_jax.evaluation.rankings import CF, POPULAR, EvaluationRows, ModelRanking
from tca4rec_jax.pages.blocks import (
    Block,
    Numbers,
    Picture,
    Pictures,
    Poster,
    Posters,
    Section,
    Text,
)

_SHOWN = 5  # places of a list
_ERRORS = 3  # of each kind
_BOUNDS = (1, 3, 10, 30, 100, 300, 1000)


class RankedRows(NamedTuple):
    """The rows of an evaluation and what each model of its table ranked for them."""

    titles: Sequence[str]
    rows: EvaluationRows
    rankings: Mapping[str, ModelRanking]
    hits: str  # as evaluation.hits
    temperatures: tuple[float, ...]

    @property
    def llms(self) -> list[str]:
        """The labels of LLMs."""
        return [label for label in self.rankings if label not in (POPULAR, CF)]

    def posters(self, row: int, label: str) -> list[Poster]:
        """The first items of a model's list."""
        items = [item for item in self.rankings[label].items_RxM[row] if item >= 0][:_SHOWN]
        target, titles = self.rows.target_R[row], self.titles
        return [
            Poster(titles[item], str(place), item == target)
            for place, item in enumerate(items, start=1)
        ]

    def before(self, row: int) -> list[Poster]:
        """What came next, and the history, newest first."""
        newest = [item for item in self.rows.history_RxH[row][::-1] if item >= 0]
        return [
            Poster(self.titles[self.rows.target_R[row]], is_target=True),
            *(Poster(self.titles[item], f"-{ago}") for ago, item in enumerate(newest, start=1)),
        ]

    def shown(self, row: int, labels: Iterable[str], words: str) -> list[Block]:
        """What came next, the history, with a few words, and what models recommended."""
        lists = {label: self.posters(row, label) for label in labels}
        return [
            *([Text(words)] if words else []),
            Posters("What came next, and the history, newest first", self.before(row)),
            *(Posters(f"{label} recommends", one) for label, one in lists.items() if one),
        ]


def ranks_side_by_side(ranked: RankedRows) -> Iterator[Section]:
    """Where an LLM ranks what came next, against where the CF model does: counts of rows."""
    cf_R, items = _ranks(ranked, CF), len(ranked.titles)
    places = {label: ranked.rankings[label].items_RxM.shape[1] for label in ranked.llms}
    tables = {
        label: rank_counts(cf_R, _ranks(ranked, label), items, places[label]) for label in places
    }
    pictures = []
    for label, table in tables.items():
        both = sum(count for row in [*table.values()][:-1] for count in [*row.values()][:-1])
        alt = f"Rows by the rank of what came next: {label} against the {CF}; table below"
        pictures.append(
            Picture(
                f"{alt}; {both} in sight of both",
                counts_figure(table, f"rank by {label}", f"rank by {CF}"),
            )
        )
    if not tables:
        return
    about = (
        f"How many rows have what came next at which rank: of the {CF} (down), of an LLM (across), "
        "whose list ends with the last number."
    )
    numbers = [
        Numbers(table, f"rank by {CF}", f"Counts: {label}", True) for label, table in tables.items()
    ]
    yield Section("LLM rank against CF rank", [Text(about), Pictures(pictures), *numbers])


def rank_counts(
    cf_R: np.ndarray, llm_R: np.ndarray, items: int, places: int
) -> dict[str, dict[str, int]]:
    """{bin of CF ranks: {bin of LLM ranks: rows}} of 0-based ranks, -1 for none.

    CF models rank `items`, LLMs list `places`.
    """
    down, across = _bins(items), _bins(places)
    of_cf_R, of_llm_R = _bin_of(cf_R, down), _bin_of(llm_R, across)
    return {
        row: {
            column: int(np.sum((of_cf_R == i) & (of_llm_R == j)))
            for j, column in enumerate([*_names(across), "none"])
        }
        for i, row in enumerate([*_names(down), "none"])
        if row != "none" or np.any(of_cf_R == i)
    }


def examples(ranked: RankedRows, rows: Iterable[int]) -> Iterator[Section]:
    """Of the rows: history, lists of the models but the most popular, what came next."""
    labels = [label for label in ranked.rankings if label != POPULAR]
    sections = [
        Section(f"Example {number} (row {row})", ranked.shown(row, labels, ""), 3)
        for number, row in enumerate(rows, start=1)
    ]
    if sections:
        yield Section("Examples", [Text("Rows drawn by chance.")])
        yield from sections


def errors(ranked: RankedRows) -> Iterator[Section]:
    """Rows that the last LLM with a likelihood was surest to get wrong, or the CF model knew."""
    ranks = {label: Ranks.of(one, ranked.temperatures) for label, one in ranked.rankings.items()}
    likely = [label for label in ranked.llms if not np.isnan(ranks[label].nll_R).any()]
    if not likely:
        return
    label, nll_R, cf_R = likely[-1], ranks[likely[-1]].nll_R, _ranks(ranked, CF)
    missed_R = _ranks(ranked, label) < 0
    surest = np.flatnonzero(missed_R)[np.argsort(-nll_R[missed_R], kind="stable")]
    known_R = missed_R & (cf_R >= 0) & (cf_R < ranked.rankings[CF].items_RxM.shape[1])
    known = np.flatnonzero(known_R)[np.lexsort((-nll_R[known_R], cf_R[known_R]))]
    about = (
        f"Rows that {label} missed. Least expected: those in which it gave what came next the "
        "least probability: it was sure of others. Known: those in which the "
        f"{CF} ranked it highest."
    )
    yield Section("Errors worth reading", [Text(about)])
    for kind, rows in (("Least expected", surest), ("Known to the CF model", known)):
        for row in rows[:_ERRORS].tolist():
            rank = f"{cf_R[row] + 1}" if cf_R[row] >= 0 else "none"
            odds = f"1 in {np.exp(np.float64(nll_R[row])):,.0f}"
            words = f"{label} gave it a probability of {odds}; its rank by the {CF} is {rank}."
            yield Section(f"{kind}: row {row}", ranked.shown(row, (label, CF), words), 3)


def _ranks(ranked: RankedRows, label: str) -> np.ndarray:
    return hit_ranks(ranked.rankings[label], ranked.hits)


def _bins(last: int) -> list[int]:
    """Where bins of ranks, counted from 1, end."""
    return [*(bound for bound in _BOUNDS if bound < last), last]


def _names(bounds: Sequence[int]) -> list[str]:
    starts = [1, *(bound + 1 for bound in bounds)]
    return [
        str(end) if start == end else f"{start} to {end}"
        for start, end in zip(starts, bounds, strict=False)
    ]


def _bin_of(rank_R: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """int [R]: the bin of each rank, the last but one for none."""
    return np.where(rank_R < 0, len(bounds), np.searchsorted(bounds, rank_R + 1))
