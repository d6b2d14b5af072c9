"""What a grid costs: estimated from the lines of finished cells and the logs of runs."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell, Line
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.reporting import Cell as Shown

Ranked = tuple[Cell, str]  # a cell and a split


class Kind(NamedTuple):
    """What costs about the same: training steps, or the ranking of a split's rows."""

    recommender: str
    data: str
    split: str  # '' of training
    aligned: bool

    @classmethod
    def of(cls, cell: Cell, split: str = "") -> "Kind":
        """Of a cell's ranking, or of its training."""
        return cls(cell.recommender, cell.data, split, bool(cell.alpha))

    def nearest(self, measured: Iterable["Kind"]) -> "Kind | None":
        """Of the same recommender, that which agrees in more of the first fields; None: none."""
        same = [kind for kind in measured if kind.recommender == self.recommender]
        return max(
            same, key=lambda kind: [a == b for a, b in zip(kind, self, strict=True)], default=None
        )


class Estimate(NamedTuple):
    """What some cells cost.

    Attributes:
      seconds, core_seconds: of what can be estimated.
      unknown: the cells of which a part cannot: nothing like it was measured.
    """

    seconds: float
    core_seconds: float
    unknown: list[Ranked]

    @property
    def time(self) -> str:
        """In words; 'at least' where something is unknown."""
        minutes, about = self.seconds / 60, "at least" if self.unknown else "about"
        return f"{about} {minutes:.1f} min" if minutes < 90 else f"{about} {minutes / 60:.1f} h"

    @property
    def core_hours(self) -> str:
        """In words."""
        return f"{self.core_seconds / 3600:.1f}"

    def __str__(self) -> str:
        return f"{self.time} ({self.core_hours} core-hours)"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What was measured, as medians.

    Attributes:
      cells: of the grid.
      step: seconds of a training step.
      row: seconds of ranking a row.
      cores: how many are busy meanwhile.
      rows: {(data, split): how many are ranked}; 0: all, which no line has counted yet.
    """

    cells: Cells
    step: Mapping[Kind, float]
    row: Mapping[Kind, float]
    cores: Mapping[Kind, float]
    rows: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, lines: Collection[Line], cells: Cells) -> "Costs":
        """Of finished cells; where a kind has none, of the log of a run that has begun."""
        llm = [line for line in lines if line.cell.steps and line.seconds.get("train")]
        steps = _medians(llm, lambda one: one.seconds["train"] / (one.cell.steps or 1), "")
        for cell in cells.all:
            if cell.is_llm and Kind.of(cell) not in steps:
                log = read_json_lines(cells.run_folder(cell).log)
                if of_steps := [line["seconds"] for line in log if "seconds" in line]:
                    steps[Kind.of(cell)] = median(of_steps)
        return cls(
            cells,
            steps,
            _medians(lines, lambda one: _ranking(one) / one.rows),
            _medians(lines, lambda one: one.core_seconds / sum(one.seconds.values())),
            _rows(lines, cells),
        )

    def estimate(self, ranked: Iterable[Ranked]) -> Estimate:
        """Each run's training counts once, its steps that are left."""
        seconds, core_seconds, unknown, trained = 0.0, 0.0, [], set()
        for cell, split in ranked:
            parts = [self._ranking(cell, split)]
            if cell.is_llm and (run := self.cells.run_name(cell)) not in trained:
                trained.add(run)
                parts.append(self._training(cell))
            known = [part for part in parts if part is not None]
            seconds += sum(known)
            core_seconds += sum(known) * self._cores(cell, split)
            if len(known) < len(parts):
                unknown.append((cell, split))
        return Estimate(seconds, core_seconds, unknown)

    def _ranking(self, cell: Cell, split: str) -> float | None:
        """Seconds; those of other data by the rows."""
        near = Kind.of(cell, split).nearest(self.row)
        if near is None:
            return None
        rows = self.rows[cell.data, split] or self.rows[near.data, near.split]
        return self.row[near] * rows

    def _training(self, cell: Cell) -> float | None:
        """Seconds of the steps that are left."""
        left, near = _steps_left(self.cells, cell), Kind.of(cell).nearest(self.step)
        if near is None:
            return None if left else 0.0
        return self.step[near] * left

    def _cores(self, cell: Cell, split: str) -> float:
        """Those of a ranking like the cell's; 1 where only a log says how long a step takes."""
        near = Kind.of(cell, split).nearest(self.cores)
        return 1.0 if near is None else self.cores[near]

    def in_words(self, missing: Sequence[Ranked], to_follow: Sequence[Ranked]) -> list[str]:
        """The estimate for what is missing, and with what follows."""
        if not missing:
            return ["Nothing is missing"]
        now, found = self.estimate(missing), self.estimate([*missing, *to_follow])
        number, unknown = len(missing) + len(to_follow), len(found.unknown)
        if unknown and not found.seconds:
            return [f"How long these {number} take is not known: nothing like them was measured"]
        more = f"; with those that follow {found}" if to_follow else ""
        lines = [f"Missing cells take {now}{more}, on a machine like those measured"]
        if unknown:
            lines.append(
                f"{unknown} of these {number} are not in it, or not wholly: no ranking, or no "
                "training, of their recommender was measured"
            )
        return lines

    def table(
        self, done: Sequence[Ranked], missing: Sequence[Ranked], to_follow: Sequence[Ranked]
    ) -> dict[str, dict[str, Shown]]:
        """A row for each recommender on data: how many cells, and what those not done cost."""
        every = done, missing, to_follow
        names = dict.fromkeys(_name(cell) for ranked in every for cell, _ in ranked)
        return {
            name: self._table_row(*([of for of in one if _name(of[0]) == name] for one in every))
            for name in names
        }

    def _table_row(
        self, done: list[Ranked], missing: list[Ranked], to_follow: list[Ranked]
    ) -> dict[str, Shown]:
        left = [*missing, *to_follow]
        cost = self.estimate(left)
        steps = {self.cells.run_name(c): _steps_left(self.cells, c) for c, _ in left if c.is_llm}
        return {
            "done": len(done),
            "missing": len(missing),
            "to follow": len(to_follow),
            "steps": sum(steps.values()),
            "time": cost.time if cost.seconds else None,  # of all that is left
            "core-hours": cost.core_hours if cost.seconds else None,
        }


def _medians(
    lines: Iterable[Line], value: Callable[[Line], float], split: str | None = None
) -> dict[Kind, float]:
    """Of each kind's lines; `split`: that of all kinds."""
    found: dict[Kind, list[float]] = {}
    for line in lines:
        kind = Kind.of(line.cell, line.split if split is None else split)
        found.setdefault(kind, []).append(value(line))
    return {kind: median(values) for kind, values in found.items()}


def _ranking(line: Line) -> float:
    """Seconds of all but the training."""
    return sum(line.seconds.values()) - line.seconds.get("train", 0.0)


def _rows(lines: Iterable[Line], cells: Cells) -> dict[tuple[str, str], int]:
    """As many as configs ask for, or as were ranked."""
    found = {}
    for data in cells.grid.data:
        config = cells.config_of_data(data)
        found[data, VALIDATION] = config.validation.rows
        found[data, TEST] = config.evaluation.rows
    return found | {(line.cell.data, line.split): line.rows for line in lines}


def _steps_left(cells: Cells, cell: Cell) -> int:
    """Of a cell's run, after its last checkpoint."""
    run = cells.run_folder(cell)
    if run.saved_steps and not run.unfinished:
        return 0  # validation may have ended it
    return max((cell.steps or 0) - run.trained_steps, 0)


def _name(cell: Cell) -> str:
    return f"{cell.data}, {cell.recommender}"
