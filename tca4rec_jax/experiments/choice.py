"""Which cells of a grid are to be ranked on which split, given those that are.

Values of the axes in Grid.chosen are chosen on the validation split, by the mean of Grid.metric
over the runs of Grid.choose_seeds, and over all cf_seeds: first those of training, by the LLM
alone, then guidance, with the runs that were chosen. What is chosen is ranked on the test split,
with every seed. alpha = 0 is a choice of its own: it is what the others are compared with. A slice
of a grid that is without a seed that chooses waits until another slice has ranked it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell

Metrics = Mapping[tuple[Cell, str], Mapping[str, Any]]
"""{(cell, split): its metrics} of those that are ranked."""


class Wanted(NamedTuple):
    """What a grid needs, as far as it is known.

    Attributes:
      ranked: cells and splits, in the order in which to do them.
      to_come: how many more there will be once choices can be made.
    """

    ranked: list[tuple[Cell, str]]
    to_come: int


def wanted(cells: Cells, results: Metrics) -> Wanted:
    """What the grid needs, given the results that there are."""
    grid = cells.grid
    if not grid.chosen:
        return Wanted([(cell, grid.split) for cell in cells.all], 0)
    baselines = [cell for cell in cells.all if not cell.is_llm]
    llm = [cell for cell in cells.all if cell.is_llm]
    steps = [_Choice(cells, results, "training"), _Choice(cells, results, "guidance")]
    ranked = [(cell, split) for cell in baselines for split in (VALIDATION, TEST)]
    to_come = 0
    for step in steps:
        llm, undecided = step.choose(llm)
        ranked += [(cell, VALIDATION) for cell in step.validated]
        to_come += undecided
    ranked += [(cell, TEST) for cell in llm]
    return Wanted(list(dict.fromkeys(ranked)), to_come)


class _Choice:
    """One choice: of what is trained, or of guidance."""

    def __init__(self, cells: Cells, results: Metrics, what: str):
        self._cells, self._results, self._what = cells, results, what
        self._here = {*cells.all}
        chosen = {"budget": "steps"}
        fields = {chosen.get(axis, axis) for axis in cells.grid.chosen}
        self._fields = fields - {"guidance"} if what == "training" else fields
        self.validated: list[Cell] = []
        """Cells of the grid that the choice compares, filled by `choose`."""

    def choose(self, llm: list[Cell]) -> tuple[list[Cell], int]:
        """(the cells that are left, how many more could be decided if their groups were ranked)."""
        groups: dict[Any, dict[Any, list[Cell]]] = {}
        for cell in llm:
            group, option = self._split(cell)
            groups.setdefault(group, {}).setdefault(option, []).append(cell)
        kept, undecided = [], 0
        for options in groups.values():
            best = self._best(options)
            if best is None:
                undecided += len(next(iter(options.values())))
            else:
                kept += options[best]
        order = {cell: number for number, cell in enumerate(llm)}
        return sorted(kept, key=order.__getitem__), undecided

    def _split(self, cell: Cell) -> tuple[Any, Any]:
        """(its group, its option in it)."""
        of_training = self._what == "training"
        shown = self._cells.run_of(cell) if of_training else cell
        seeds = {"seed": None, "cf_seed": None}  # all of them share a choice
        fields = dataclasses.asdict(shown) | seeds | {"aligned": bool(cell.alpha)}
        if not of_training:
            fields["guided"] = bool(cell.guidance)
        option = {name: fields.pop(name) for name in self._fields}
        return tuple(fields.items()), tuple(option.items())

    def _best(self, options: Mapping[Any, list[Cell]]) -> Any | None:
        """The option of the best mean on the validation split; None if one is not ranked yet."""
        grid = self._cells.grid
        compared = {option: self._compared(cells) for option, cells in options.items()}
        is_choice = len(options) > 1
        if is_choice or self._what == "training":
            every = (cell for cells in compared.values() for cell in cells)
            self.validated += [cell for cell in every if cell in self._here]
        if not is_choice:
            return next(iter(options))
        guided = any(cell.guidance for cells in compared.values() for cell in cells)
        metric = grid.guided_metric if guided else grid.metric
        means = {option: self._mean(cells, metric) for option, cells in compared.items()}
        if any(map(math.isnan, means.values())):
            return None
        first_of_best = min if metric == NLL else max
        return first_of_best(means, key=means.__getitem__)

    def _compared(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of an option that count: the least guided one of every seed that chooses.

        Also of a seed that the grid is without.
        """
        seeds, cells = self._cells.grid.choose_seeds, list(cells)
        least = min(cell.guidance or 0.0 for cell in cells)
        of_least = [cell for cell in cells if (cell.guidance or 0.0) == least]
        if not seeds:
            return of_least
        of_seeds = (dataclasses.replace(cell, seed=seed) for seed in seeds for cell in of_least)
        return list(dict.fromkeys(of_seeds))

    def _mean(self, cells: list[Cell], metric: str) -> float:
        """Of the cells' metric on the validation split; NaN if one is missing."""
        found = [self._results.get((cell, VALIDATION), {}).get(metric, math.nan) for cell in cells]
        return sum(found) / len(found)
