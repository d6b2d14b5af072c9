"""What the finished cells of a grid did on each row, by setup: a cell without its seeds.

Axis letters: R rows, S seeds, I items.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.agreements import with_agreement
from tca4rec_jax.experiments.results import (
    CF,
    FILE,
    POPULAR,
    TEST,
    VALIDATION,
    Cell,
    Line,
    RowRanks,
    read_lines,
)
from tca4rec_jax.fileio import read_npz
from tca4rec_jax.metrics import metric_values
from tca4rec_jax.provenance import short

TRAINED_ALIKE = ("steps", "softmax", "tau")
"""What is the same of an aligned setup and the one with alpha = 0, unless both chose their own."""
_SEEDS = ("seed", "cf_seed")
_OF_SEED = ("seed", "weights", "made_from", "step")
"""What a line is made from that another seed changes: weights may be drawn, steps be chosen."""
_OF_CF_SEED = ("CF logits", "item vectors")
"""How the names begin of what another seed of the CF model changes."""


class RowFacts(NamedTuple):
    """What is known of the rows of a split and of the items: W/rows/<data>-<split>.npz."""

    position_R: np.ndarray  # int64, as in RowRanks
    target_R: np.ndarray  # int32
    history_R: np.ndarray  # int, items before the target
    count_I: np.ndarray  # int, training interactions


def setup_of(cell: Cell) -> Cell:
    """The cell without its seeds."""
    return dataclasses.replace(cell, seed=None, cf_seed=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The lines of a grid's work directory W, and the files that they name, read once.

    Whatever reads the setups raises UserError for seeds of one that were made from other inputs.
    """

    workdir: Path
    lines: Mapping[tuple[Cell, str], Line]

    @classmethod
    def read(cls, workdir: Path) -> "Results":
        """Raises UserError if nothing is finished there."""
        if not (lines := read_lines(workdir)):
            raise UserError(
                f"{workdir / FILE} has no line: run launch/experiments.py --workdir={workdir} first"
            )
        return cls(workdir, {of: with_agreement(workdir, line) for of, line in lines.items()})

    def with_tested(self, wanted: Collection[tuple[Cell, str]]) -> "Results":
        """Of the lines of test rows those alone that are wanted."""
        kept = {of: one for of, one in self.lines.items() if of[1] != TEST or of in wanted}
        return Results(self.workdir, kept)

    @cached_property
    def _by_setup(self) -> dict[tuple[Cell, str], list[Cell]]:
        found: dict[tuple[Cell, str], list[Cell]] = {}
        for cell, split in self.lines:
            found.setdefault((setup_of(cell), split), []).append(cell)
        for (_, split), (first, *others) in found.items():
            for other in others:
                _check_made_alike(self.lines[first, split], self.lines[other, split])
        return {of: sorted(cells, key=_seeds) for of, cells in found.items()}

    def setups(self, split: str, **fields: object) -> list[Cell]:
        """Those that were ranked on a split, whose fields have the given values."""
        return [
            setup
            for setup, on in self._by_setup
            if on == split and all(getattr(setup, name) == value for name, value in fields.items())
        ]

    def cells(self, setup: Cell, split: str) -> list[Cell]:
        """The cells of a setup on a split, by seed; none if it was not ranked."""
        return self._by_setup.get((setup, split), [])

    def of_setup(self, setup: Cell, split: str) -> list[Line]:
        """The lines of its cells."""
        return [self.lines[cell, split] for cell in self.cells(setup, split)]

    def metric(self, split: str) -> str:
        """NDCG at the largest K that every line of the split has."""
        of_lines = [{*line.metrics} for (_, on), line in self.lines.items() if on == split]
        names = set.intersection(*of_lines) if of_lines else set()
        cutoffs = [int(name[5:]) for name in names if name.startswith("ndcg@")]
        return f"ndcg@{max(cutoffs, default=10)}"

    def plain(self, setup: Cell, split: str) -> Cell | None:
        """The setup with alpha = 0 and no guidance that an aligned one is compared with.

        Trained alike if there is such a one. Where `TRAINED_ALIKE` was chosen, for alpha = 0 apart,
        it is the only one that there is.
        """
        same = {"data": setup.data, "recommender": setup.recommender, "alpha": 0.0, "guidance": 0.0}
        found = [one for one in self.setups(split, **same) if one.cf in (None, setup.cf)]
        alike = [one for one in found if _trained(one) == _trained(setup)]
        if alike:
            return alike[0]
        rest = _but_trained(setup)
        is_chosen = sum(_but_trained(one) == rest for one in self.setups(split)) == 1
        return found[0] if is_chosen and len(found) == 1 else None

    def teacher(self, setup: Cell, split: str) -> Cell | None:
        """The setup of the CF model that aligns or guides a setup."""
        found = self.setups(split, data=setup.data, recommender=CF, cf=setup.cf)
        return next(iter(found), None)

    def popular(self, data: str, split: str) -> Cell | None:
        """The setup of the most popular items."""
        return next(iter(self.setups(split, data=data, recommender=POPULAR)), None)

    def ranks(self, cell: Cell, split: str) -> RowRanks:
        """What a cell did on each row. Raises UserError for a file that is missing or damaged."""
        path = self.lines[cell, split].ranks
        if path not in self._ranks:
            self._ranks[path] = RowRanks.read(self.workdir / path)
        return self._ranks[path]

    @cached_property
    def _ranks(self) -> dict[str, RowRanks]:
        return {}

    @cached_property
    def _facts(self) -> dict[tuple[str, str], RowFacts]:
        return {}

    def facts(self, cell: Cell, split: str) -> RowFacts:
        """Of the rows of a cell.

        Raises UserError for a file that is missing or damaged, or of other rows than the cell's.
        """
        of, path = (cell.data, split), self.workdir / "rows" / f"{cell.data}-{split}.npz"
        if of not in self._facts:
            saved = read_npz(path, remedy="rank a cell anew (launch/experiments.py --anew)")
            self._facts[of] = RowFacts(*(saved[name] for name in RowFacts._fields))
        if not np.array_equal(self._facts[of].position_R, self.ranks(cell, split).position_R):
            raise UserError(
                f"{path} is of other rows than those on which {cell.label!r} was ranked: compute "
                "the cell anew (launch/experiments.py --anew)"
            )
        return self._facts[of]

    def pairs(self, setup: Cell, baseline: Cell, split: str) -> Iterator[tuple[Cell, Cell]]:
        """(a cell of the setup, that of the baseline with the same seeds), for each that has one.

        A seed that one of both does not have, as a CF model that of an LLM, is any.
        """
        others = self.cells(baseline, split)
        for cell in self.cells(setup, split):
            alike = [one for one in others if _alike(cell, one)]
            if alike:
                yield cell, alike[0]

    def temperature(self, setup: Cell) -> float | None:
        """That of the setup's lowest NLL on its validation rows, all seeds; None without any."""
        if setup not in self._temperatures:
            every = [self.ranks(cell, VALIDATION) for cell in self.cells(setup, VALIDATION)]
            known = [ranks for ranks in every if not np.isnan(ranks.temperature_T).any()]
            best = None
            if known:
                nll_T = np.mean([ranks.nll_RxT.mean(axis=0) for ranks in known], axis=0)
                best = float(known[0].temperature_T[np.argmin(nll_T)])
            self._temperatures[setup] = best
        return self._temperatures[setup]

    @cached_property
    def _temperatures(self) -> dict[Cell, float | None]:
        return {}

    def values(self, cell: Cell, split: str, metric: str) -> np.ndarray:
        """float64 [R] of 'ndcg@K', 'hr@K' or NLL; NaN where a row has none.

        The NLL is at the `temperature` of its setup, at 1 if that has none.
        """
        ranks = self.ranks(cell, split)
        if metric == NLL:
            return ranks.nll_R(self.temperature(setup_of(cell)) or 1.0).astype(np.float64)
        return metric_values(ranks.rank_R, (int(metric.partition("@")[2]),))[metric]

    def mean(self, setup: Cell, split: str, metric: str) -> float | None:
        """Of `values` over seeds and rows; None if there is none."""
        values = [self.values(cell, split, metric) for cell in self.cells(setup, split)]
        return None if not values or np.isnan(values).any() else float(np.mean(values))

    def paired(
        self, setup: Cell, baseline: Cell, split: str, metric: str
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """float64 [S, R] of both, the same rows and seeds; None if nothing is there to compare.

        Cells that are compared with one and the same run of an LLM are one seed, their mean: of
        several seeds of a CF model and one of alpha = 0, for one. Raises UserError if they were not
        ranked on the same rows.
        """
        both = [*self.pairs(setup, baseline, split)]
        for one, other in both:
            self.check_same_rows(one, other, split)
        columns = [[self.values(cell, split, metric) for cell in pair] for pair in both]
        if not columns or np.isnan(columns).any():
            return None
        runs: dict[Cell, list] = {}
        for (one, other), column in zip(both, columns, strict=True):
            runs.setdefault(other if other.is_llm else one, []).append(column)
        means = [np.mean(of_run, axis=0) for of_run in runs.values()]
        ours_SxR, theirs_SxR = np.swapaxes(means, 0, 1)
        return ours_SxR, theirs_SxR

    def check_same_rows(self, one: Cell, other: Cell, split: str) -> None:
        """Raises UserError if two cells were not ranked on the same rows."""
        a, b = self.ranks(one, split), self.ranks(other, split)
        same = ("user_R", "target_R", "position_R")
        if not all(np.array_equal(getattr(a, name), getattr(b, name)) for name in same):
            raise UserError(
                f"{one.label!r} and {other.label!r} were not ranked on the same {split} rows: "
                "compute the older one anew (launch/experiments.py --anew)"
            )


def _trained(setup: Cell) -> tuple:
    """How it was trained, its labels aside."""
    return tuple(getattr(setup, name) for name in TRAINED_ALIKE)


def _but_trained(setup: Cell) -> Cell:
    nothing: dict[str, Any] = dict.fromkeys(TRAINED_ALIKE)
    return dataclasses.replace(setup, **nothing)


def _seeds(cell: Cell) -> tuple[int, ...]:
    return tuple(-1 if seed is None else seed for seed in (cell.seed, cell.cf_seed))


def _check_made_alike(one: Line, other: Line) -> None:
    """Raises UserError if seeds of a setup were made from other inputs, but those of a seed."""
    ours, theirs = one.made_from.inputs, other.made_from.inputs
    same_cf = one.cell.cf_seed == other.cell.cf_seed

    def is_of_seed(name: str) -> bool:
        name = name.removeprefix("run.")
        return name in _OF_SEED or (not same_cf and name.startswith(_OF_CF_SEED))

    differ = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    found = [
        f"{name.removeprefix('run.')} is {short(ours[name])} and {short(theirs[name])}"
        for name in differ
        if not is_of_seed(name)
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{one.cell.label!r} and {other.cell.label!r}, on {one.split} rows, are no seeds of "
            f"one setup, they were made from other inputs: {'; '.join(found[:3])}{more}: compute "
            "one of them anew (launch/experiments.py --anew)"
        )


def _alike(one: Cell, other: Cell) -> bool:
    seeds = ((getattr(one, name), getattr(other, name)) for name in _SEEDS)
    return all(None in pair or pair[0] == pair[1] for pair in seeds)
