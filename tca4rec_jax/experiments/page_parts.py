"""A grid's page as it grows: sections, and pictures beside it, each panel a figure of its own."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from tca4rec_jax.experiments.curves import Panels, Series
from tca4rec_jax.experiments.pictures import (
    Difference,
    Differences,
    differences_figure,
    lines_figure,
)
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.pages.blocks import Block, Picture, Pictures, Section
from tca4rec_jax.reporting import save_figure

Panel = TypeVar("Panel")


@dataclass
class GridPage:
    """The page at `output`; `drawn` is what its pictures show, by name, as JSON holds it."""

    output: Path
    results: Results
    sections: list[Section] = field(default_factory=list)
    drawn: dict[str, dict] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of pictures and numbers."""
        return self.output.with_suffix("")

    def section(self, title: str, *blocks: Block, level: int = 2) -> None:
        """Begins one."""
        self.sections.append(Section(title, [*blocks], level))

    def part(self, title: str, *blocks: Block) -> None:
        """Begins a part of the section."""
        self.section(title, *blocks, level=3)

    def add(self, *blocks: Block) -> None:
        """To the last section or part."""
        last = self.sections[-1]
        self.sections[-1] = last._replace(blocks=[*last.blocks, *blocks])

    def pictures(self, name: str, alt: str, panels: Panels, xlabel: str, scale: str) -> None:
        """Lines: a picture for each data set, a panel for each recommender."""
        for data, of_data in _by_data(panels).items():
            pictures = [
                Picture(
                    f"{quantity} over {xlabel}, {data}, {recommender}: {_ends(lines)}",
                    lines_figure(
                        {quantity: {recommender: lines}}, xlabel, scale=scale, among=of_data
                    ),
                )
                for quantity, row in of_data.items()
                for recommender, lines in row.items()
            ]
            figure = lines_figure(of_data, xlabel, scale=scale)
            words = f"{alt}, on {data}: {', '.join(of_data)}"
            self._show(f"{name}_{data}", words, of_data, figure, pictures)

    def differences(self, name: str, alt: str, panels: Differences, xlabel: str) -> None:
        """Intervals: the same."""
        for data, row in _by_data({"": panels}).items():
            of_data = row[""]
            pictures = [
                Picture(
                    f"{alt}, {data}, {recommender}: {_means(panel)}",
                    differences_figure({recommender: panel}, xlabel, among=of_data),
                )
                for recommender, panel in of_data.items()
            ]
            figure = differences_figure(of_data, xlabel)
            words = f"{alt}, on {data}, with 95% intervals"
            self._show(f"{name}_{data}", words, of_data, figure, pictures)

    def _show(
        self, name: str, alt: str, drawn: Mapping, figure: Figure, pictures: list[Picture]
    ) -> None:
        self.drawn[name] = _plainly(drawn)
        save_figure(self.folder / f"{name}.png", figure)
        self.add(Pictures(pictures, f"{self.folder.name}/{name}.png", alt))


def _ends(lines: Iterable[Series]) -> str:
    """In words, where lines begin and end."""
    return "; ".join(
        f"{', '.join(filter(None, [line.color, line.style]))} from {line.y[0]:.4g} at "
        f"{line.x[0]:g} to {line.y[-1]:.4g} at {line.x[-1]:g}"
        for line in lines
    )


def _means(panel: Mapping[str, Mapping[str, Difference]]) -> str:
    """In words, the differences of a panel."""
    return "; ".join(
        f"{row}, {line} {one.interval.mean:+.4g}"
        for row, of in panel.items()
        for line, one in of.items()
    )


def _by_data(panels: Mapping[str, Mapping[str, Panel]]) -> dict[str, dict[str, dict[str, Panel]]]:
    """{data: {quantity: {recommender: panel}}} of {quantity: {'data, recommender': panel}}."""
    found: dict[str, dict[str, dict[str, Panel]]] = {}
    for quantity, row in panels.items():
        for name, panel in row.items():
            data, _, recommender = name.partition(", ")
            found.setdefault(data, {}).setdefault(quantity, {})[recommender] = panel
    return found


def _plainly(drawn: Any) -> Any:
    """As JSON holds it: lists and objects."""
    if isinstance(drawn, Series | Difference):
        return drawn._asdict()
    if isinstance(drawn, Mapping):
        return {name: _plainly(one) for name, one in drawn.items()}
    return [_plainly(one) for one in drawn]
