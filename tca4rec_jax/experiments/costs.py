"""What a grid costs: estimated from the lines of finished cells and the logs of runs."""

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import median

from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.results import Cell, Line
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.reporting import Cell as Shown
from tca4rec_jax.training.run_folder import RunFolder

Kind = tuple[str, str, bool]  # data, recommender, whether it is aligned


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds by kind of cell.

    Attributes:
      cells: of the grid.
      step: of a training step, {kind: seconds}.
      ranking: of one cell's ranking.
    """

    cells: Cells
    step: dict[Kind, float]
    ranking: dict[Kind, float]

    @classmethod
    def of(cls, lines: Iterable[Line], cells: Cells) -> "Costs":
        """The medians of what was measured; runs that have begun count with their log."""
        steps: dict[Kind, list[float]] = {}
        rankings: dict[Kind, list[float]] = {}
        for line in lines:
            kind = _kind(line.cell)
            seconds = line.seconds["evaluate"] + line.seconds.get("measure", 0.0)
            rankings.setdefault(kind, []).append(seconds)
            if line.cell.steps and line.seconds.get("train"):
                steps.setdefault(kind, []).append(line.seconds["train"] / line.cell.steps)
        for cell in cells.all:
            kind = _kind(cell)
            if cell.is_llm and kind not in steps:
                log = read_json_lines(cells.run_folder(cell).log)
                if of_steps := [line["seconds"] for line in log if "seconds" in line]:
                    steps[kind] = [median(of_steps)]
        return cls(cells, *({k: median(of) for k, of in one.items()} for one in (steps, rankings)))

    def seconds(self, ranked: Sequence[tuple[Cell, str]]) -> tuple[float, int]:
        """(of the cells that can be estimated, each run's training once; how many cannot)."""
        total, unknown, trained = 0.0, 0, set()
        for cell, _ in ranked:
            step, ranking = self._near(self.step, cell), self._near(self.ranking, cell)
            if ranking is None or (cell.is_llm and step is None):
                unknown += 1
                continue
            total += ranking
            name = self.cells.run_name(cell) if cell.is_llm else ""
            if cell.is_llm and name not in trained:
                trained.add(name)
                run = self.cells.run_folder(cell)
                total += (step or 0.0) * max((cell.steps or 0) - _steps_done(run), 0)
        return total, unknown

    def _near(self, measured: dict[Kind, float], cell: Cell) -> float | None:
        """Of the cell's kind, or else of the same recommender aligned or not."""
        data, recommender, aligned = _kind(cell)
        found = measured.get((data, recommender, aligned))
        return measured.get((data, recommender, not aligned)) if found is None else found

    def in_words(self, missing: Sequence[tuple[Cell, str]], to_come: int) -> list[str]:
        """The estimate for what is missing."""
        if not missing and not to_come:
            return ["Nothing is missing"]
        total, unknown = self.seconds(missing)
        each = total / max(len(missing) - unknown, 1)
        about = f"Missing cells take about {_time(total)} on a machine like those measured"
        more = f"; those that follow about {_time(each * to_come)}" if to_come and total else ""
        lines = [about + more] if total else []
        if unknown:
            lines.append(f"{unknown} of them cannot be estimated before the first of their kind")
        return lines

    def table(
        self, done: Sequence[tuple[Cell, str]], missing: Sequence[tuple[Cell, str]]
    ) -> dict[str, dict[str, Shown]]:
        """A row for each recommender on data: cells done and missing, and the estimate."""
        found: dict[str, dict[str, Shown]] = {}
        for cell, _ in (*done, *missing):
            name = f"{cell.data}, {cell.recommender}"
            if name in found:
                continue
            mine, left = (
                [
                    of
                    for of in each
                    if of[0].data == cell.data and of[0].recommender == cell.recommender
                ]
                for each in (done, missing)
            )
            seconds, unknown = self.seconds(left)
            known = len(left) > unknown or not left
            found[name] = {
                "done": len(mine),
                "missing": len(left),
                "time for these": _time(seconds) if known else None,
            }
        return found


def _kind(cell: Cell) -> Kind:
    return cell.data, cell.recommender, bool(cell.alpha)


def _steps_done(run: RunFolder) -> int:
    """Also of a run whose checkpoints were deleted when it was done."""
    lines = read_json_lines(run.log)
    return max((line.get("step", -1) + 1 for line in lines), default=0)


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
