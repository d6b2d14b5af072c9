"""Curves of a grid over one axis: accuracy, agreement with the CF model, lists, texts.

Axis letters: R rows, M places of a list.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.effects import Effect, effects
from tca4rec_jax.experiments.measures import AGREEMENT, FLUENCY
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell, Line
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import Question, in_words, told_apart
from tca4rec_jax.metrics import coverage


class Series(NamedTuple):
    """A line of a picture.

    Attributes:
      color, style: what the line stands for: a CF model, and what else tells lines apart ('').
      x, y: its points; low, high: of their bars, or None.
    """

    color: str
    style: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


PLAIN = "alpha = 0"
"""What a line without a CF model stands for."""

Panels = dict[str, dict[str, list[Series]]]
"""{what y is: {panel, 'DATA, RECOMMENDER': lines}}."""


class Curve(NamedTuple):
    """Setups that differ in one axis alone, and what each is compared with, if that is there."""

    panel: str
    color: str
    style: str
    setups: dict[float, Cell]  # by the value of the axis, ascending
    baselines: dict[float, Cell]


def split_of(results: Results, axis: str) -> str:
    """The split that has more values of an axis; validation of two that have as many."""
    counts = {
        split: len({getattr(one, axis) for one in results.setups(split)} - {None})
        for split in (VALIDATION, TEST)
    }
    return max(counts, key=counts.__getitem__)


def curves(results: Results, axis: str, split: str) -> list[Curve]:
    """The curves over 'alpha', 'beta', 'tau' or 'guidance' of aligned LLMs with several values.

    Those over other axes than guidance are of LLMs that nothing guides. A curve over alpha begins
    with alpha = 0; all are compared with that, at their own tau, but over guidance with guidance 0.
    """
    aligned = [one for one in results.setups(split) if one.is_llm and one.alpha]
    if axis != "guidance":
        aligned = [one for one in aligned if not one.guidance]
    groups: dict[Cell, dict[float, Cell]] = {}
    for one in aligned:
        changed: dict[str, Any] = {axis: None}
        group = dataclasses.replace(one, **changed)
        groups.setdefault(group, {})[getattr(one, axis)] = one
    found = []
    several = [group for group, of in groups.items() if len(of) > 1]
    for group in several:
        setups = groups[group]
        of_each = {x: results.plain(one, split) for x, one in setups.items()}
        if axis == "guidance":
            of_each = dict.fromkeys(setups, setups.get(0.0))
        baselines = {x: one for x, one in sorted(of_each.items()) if one is not None}
        if axis == "alpha" and baselines:
            setups[0.0] = next(iter(baselines.values()))
        panel, color = f"{group.data}, {group.recommender}", str(group.cf)
        ordered = dict(sorted(setups.items()))
        found.append(Curve(panel, color, told_apart(group, several), ordered, baselines))
    return found


def metric_panels(results: Results, of: Iterable[Curve], split: str) -> Panels:
    """The curves of NDCG and NLL; bars are the 95% intervals of differences from the baseline."""
    of = [*of]
    metrics = results.metric(split), NLL
    pairs = {
        (number, x): (curve.setups[x], baseline)
        for number, curve in enumerate(of)
        for x, baseline in curve.baselines.items()
        if curve.setups[x] != baseline
    }
    found = effects(results, pairs, split, metrics)
    panels: Panels = {}
    for metric in metrics:
        for number, curve in enumerate(of):
            points = []
            for x, setup in curve.setups.items():
                mean, effect = results.mean(setup, split, metric), found.get(((number, x), metric))
                if mean is None:
                    continue
                low, high = (0.0, 0.0) if effect is None else _about_mean(effect)
                points.append((x, mean, mean + low, mean + high))
            if len(points) > 1:
                name = "NLL of the title" if metric == NLL else metric.upper()
                line = Series(curve.color, curve.style, *map(list, zip(*points, strict=True)))
                drawn = panels.setdefault(name, {}).setdefault(curve.panel, [])
                drawn += [*_level(results, curve, split, metric), line]
    return panels


def _level(results: Results, curve: Curve, split: str, metric: str) -> list[Series]:
    """The line of the baselines, level if they are one, unless they are points of the curve."""
    means = {
        x: mean
        for x, one in curve.baselines.items()
        if one not in curve.setups.values()
        and (mean := results.mean(one, split, metric)) is not None
    }
    return [Series(PLAIN, curve.style, [*means], [*means.values()])] if means else []


def _about_mean(effect: Effect) -> tuple[float, float]:
    """How far below and above the mean the interval of a difference lies."""
    mean, low, high = effect.difference
    return low - mean, high - mean


def line_panels(
    results: Results,
    of: Iterable[Curve],
    split: str,
    quantities: Mapping[str, Callable[[Curve, Line], float | None]],
) -> Panels:
    """The curves of what lines hold: means over seeds, bars from the least to the largest."""
    panels: Panels = {}
    for name, quantity in quantities.items():
        for curve in of:
            points = []
            for x, setup in curve.setups.items():
                values = [quantity(curve, line) for line in results.of_setup(setup, split)]
                there = [value for value in values if value is not None]
                if there:
                    points.append((x, float(np.mean(there)), min(there), max(there)))
            if len(points) > 1:
                line = Series(curve.color, curve.style, *map(list, zip(*points, strict=True)))
                panels.setdefault(name, {}).setdefault(curve.panel, []).append(line)
    return panels


_AGREEMENT = {
    "mean CF rank of the list": "cf rank of the list",
    "share at CF rank 1": "first of both",
    "Kendall tau": "kendall tau",
}
_LISTS = {"share of items listed": "coverage", "popularity, relative to targets": "popularity"}
_FLUENCY = {"perplexity of titles": "perplexity", "share of valid titles": "written titles"}


def agreement_panels(results: Results, of: Iterable[Curve], split: str) -> Panels:
    """How far lists agree with the CF model of the curve, those of alpha = 0 too."""

    def quantity(name: str, curve: Curve, line: Line) -> float | None:
        return line.metrics.get(AGREEMENT, {}).get(curve.color, {}).get(name)

    shown = {words: partial(quantity, name) for words, name in _AGREEMENT.items()}
    return line_panels(results, of, split, shown)


def fluency_panels(results: Results, of: Iterable[Curve], split: str) -> Panels:
    """What the LLM writes and expects without the trie."""

    def quantity(name: str, _: Curve, line: Line) -> float | None:
        return line.metrics.get(FLUENCY, {}).get(name)

    shown = {words: partial(quantity, name) for words, name in _FLUENCY.items()}
    return line_panels(results, of, split, shown)


def list_panels(results: Results, of: Iterable[Curve], split: str) -> Panels:
    """How much of the catalogue is listed, and how popular that is."""

    def quantity(name: str, _: Curve, line: Line) -> float:
        return list_character(results, line)[name]

    shown = {words: partial(quantity, name) for words, name in _LISTS.items()}
    return line_panels(results, of, split, shown)


def list_character(results: Results, line: Line) -> dict[str, float]:
    """'coverage': the share of the items in any list; 'popularity': mean training interactions of
    what is listed, relative to those of the targets."""
    facts = results.facts(line.cell, line.split)
    items_RxM = results.ranks(line.cell, line.split).items_RxM
    listed_n = items_RxM[items_RxM >= 0]
    of_targets = facts.count_I[facts.target_R].mean()
    return {
        "coverage": coverage(items_RxM, len(facts.count_I)),
        "popularity": float(facts.count_I[listed_n].mean() / of_targets),
    }


def character_table(results: Results, question: Question) -> dict[str, dict[str, str]]:
    """What lists and texts of compared setups are like on the test rows, 'baseline → setup'.

    Means over seeds; a column that neither has is left out.
    """
    rows = {}
    for setup, baseline in question.compared.items():
        both = [_character(results, one, str(setup.cf)) for one in (baseline, setup)]
        rows[in_words(setup, question.compared)] = {
            name: f"{both[0][name]:.3g} → {both[1][name]:.3g}"
            for name in both[1]
            if name in both[0]
        }
    return rows


def _character(results: Results, setup: Cell, cf: str) -> dict[str, float]:
    """Means over seeds of what lines hold of lists and texts, agreement with a CF model."""
    found: dict[str, list[float]] = {}
    for line in results.of_setup(setup, TEST):
        agreement = line.metrics.get(AGREEMENT, {}).get(cf, {})
        of_line = {words: agreement.get(name) for words, name in _AGREEMENT.items()}
        of_line |= {words: list_character(results, line)[name] for words, name in _LISTS.items()}
        of_texts = line.metrics.get(FLUENCY, {})
        of_line |= {words: of_texts.get(name) for words, name in _FLUENCY.items()}
        for words, value in of_line.items():
            if value is not None:
                found.setdefault(words, []).append(value)
    return {words: float(np.mean(values)) for words, values in found.items()}
