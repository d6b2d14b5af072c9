"""The tables of a grid's page: what the alignment does, all models side by side, what it cost.

Axis letters: R rows, S seeds.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.effects import Effect, effects
from tca4rec_jax.experiments.results import CF, POPULAR, TEST, VALIDATION, Cell, Line
from tca4rec_jax.experiments.setups import TRAINED_ALIKE, Results, setup_of
from tca4rec_jax.intervals import Interval, Name, bootstrap_intervals, seed_spread
from tca4rec_jax.reporting import Cell as Shown
from tca4rec_jax.reporting import Rows

MISSING = "missing"
OF_TRAINING = ("steps", "softmax", "form", "tau", "beta")
_FIELDS = (*OF_TRAINING, "alpha", "guidance")


class Question(NamedTuple):
    """A comparison that the grid was made for.

    Attributes:
      compared: {setup: what it is compared with}.
      missing: in words, what should be compared and is not there.
      effects: {(setup, metric): effect}; Holm's correction is over all of them.
    """

    compared: Mapping[Cell, Cell]
    missing: Sequence[str]
    effects: Mapping[tuple[Cell, str], Effect]

    def better(self, metric: str) -> tuple[int, int]:
        """(how many setups are better in a metric, how many are compared or missing)."""
        shown = [one.is_better for (_, of), one in self.effects.items() if of == metric]
        return sum(map(bool, shown)), len(self.compared) + len(self.missing)

    @property
    def of_one_seed(self) -> int:
        """How many setups were compared with one seed alone."""
        return len({setup for (setup, _), one in self.effects.items() if one.seeds == 1})

    def of_one_cf_run(self, results: Results) -> int:
        """How many setups of several seeds were compared with one run of a CF model."""
        several = {setup for (setup, _), one in self.effects.items() if one.seeds > 1}
        of_each = [
            {cf.cf_seed for _, cf in results.pairs(setup, self.compared[setup], TEST)}
            for setup in several
            if self.compared[setup].recommender == CF
        ]
        return sum(len(seeds) == 1 and None not in seeds for seeds in of_each)

    def temperatures_not_chosen(self, results: Results) -> Counter[str]:
        """{the temperature of the NLL, in words: of how many models} where no validation row chose
        it."""
        found: Counter[str] = Counter()
        for one in {*self.compared, *self.compared.values()}:
            ranks = [results.ranks(cell, TEST) for cell in results.cells(one, TEST)]
            if any(np.isnan(of.temperature_T).any() for of in ranks):
                found["that is best for these rows themselves: no other was kept"] += 1
            elif results.temperature(one) is None:
                found["1: no validation rows chose another"] += 1
        return found


def aligned_against_plain(results: Results) -> Question:
    """Every aligned LLM on the test rows against the same one with alpha = 0."""
    found = _aligned(results, TEST)
    missing = [f"{in_words(one)}: alpha = 0" for one, plain in found.items() if plain is None]
    there = {(one.data, one.recommender, one.cf) for one in found}
    missing += [f"{', '.join(of)}: aligned" for of in _expected(results) if of not in there]
    compared = {one: plain for one, plain in found.items() if plain is not None}
    return _question(results, compared, missing, (results.metric(TEST), NLL))


def aligned_on_validation(results: Results) -> Question:
    """The same of a grid that ranks validation rows alone, without effects."""
    found = _aligned(results, VALIDATION)
    return Question({one: plain for one, plain in found.items() if plain is not None}, [], {})


def _aligned(results: Results, split: str) -> dict[Cell, Cell | None]:
    aligned = [one for one in _llms(results, split) if one.alpha and not one.guidance]
    return {one: results.plain(one, split) for one in aligned}


def guided_against_teacher(results: Results) -> Question:
    """Every aligned LLM that its CF model guides, on the test rows, against that model."""
    guided = [one for one in _llms(results) if one.alpha and one.guidance]
    found = {one: results.teacher(one, TEST) for one in guided}
    missing = [f"{in_words(one)}: its CF model" for one, cf in found.items() if cf is None]
    there = {(one.data, one.recommender, one.cf) for one in guided}
    missing += [f"{', '.join(of)}: guided" for of in _expected(results) if of not in there]
    compared = {one: cf for one, cf in found.items() if cf is not None}
    return _question(results, compared, missing, (results.metric(TEST),))


def recommenders_compared(results: Results) -> Question:
    """Every other recommender on the test rows against the first that was ranked on the same data.

    Both plain, or both aligned with the same CF model: at the same alpha and after as many steps if
    there is such a one, else at the alpha of its own.
    """
    llms = [one for one in _llms(results) if not one.guidance]
    found: dict[Cell, Cell] = {}
    for one in llms:
        first = next(other.recommender for other in llms if other.data == one.data)
        others = [
            other
            for other in llms
            if (other.data, other.recommender) == (one.data, first)
            and bool(other.alpha) == bool(one.alpha)
            and (not one.alpha or other.cf == one.cf)
        ]
        if one.recommender != first and others:
            found[one] = max(others, key=lambda o: (o.alpha == one.alpha, o.steps == one.steps))
    return _question(results, found, [], (results.metric(TEST), NLL))


def _question(results, compared, missing, metrics) -> Question:
    pairs = {setup: (setup, baseline) for setup, baseline in compared.items()}
    return Question(compared, missing, effects(results, pairs, TEST, metrics))


def _llms(results: Results, split: str = TEST) -> list[Cell]:
    return [setup for setup in results.setups(split) if setup.is_llm]


def _expected(results: Results) -> list[tuple[str, str, str]]:
    """(data, recommender, CF model) of all that occur together in some line."""
    cells = [cell for cell, _ in results.lines]
    pairs = dict.fromkeys((cell.data, cell.recommender) for cell in cells if cell.is_llm)
    models = dict.fromkeys((c.data, c.cf) for c in cells if c.recommender == CF and c.cf)
    return [(*pair, cf) for pair in pairs for data, cf in models if data == pair[0]]


def in_words(setup: Cell, among: Iterable[Cell] = (), fields: Sequence[str] = _FIELDS) -> str:
    """'movielens, titles, sasrec', and what tells it from the setups `among` which it stands."""
    if setup.recommender == POPULAR:
        return f"{setup.data}, most popular"
    if setup.recommender == CF:
        return f"{setup.data}, {setup.cf}"
    of_run = filter(None, [setup.cf, told_apart(setup, among, fields)])
    return ", ".join([setup.data, setup.recommender, *of_run])


def told_apart(setup: Cell, among: Iterable[Cell], fields: Sequence[str] = _FIELDS) -> str:
    """The values of the fields that tell it from others of its recommender and CF model, or ''."""
    own = setup.data, setup.recommender, setup.cf
    others = [one for one in among if (one.data, one.recommender, one.cf) == own]
    parts = []
    for name in fields:
        value = getattr(setup, name)
        if value is not None and len({getattr(one, name) for one in others} - {None}) > 1:
            parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def named(setups: Iterable[Cell]) -> dict[Cell, str]:
    """The words for each of the setups of one table."""
    setups = [*setups]
    return {setup: in_words(setup, setups) for setup in setups}


def question_table(question: Question, metric: str, most: int, both: tuple[str, str]) -> Rows:
    """A row for each setup; one that is missing has nothing but the verdict 'missing'.

    `most` is the number of seeds that all should have, `both` the headings of baseline and setup.
    """
    rows: dict[str, dict[str, Shown]] = {}
    for setup, name in named(question.compared).items():
        rows[name] = {"alpha": _alphas(setup, question.compared[setup])}
        rows[name] |= {"guidance": _plainly(setup.guidance)}
        one = question.effects.get((setup, metric))
        if one is None:
            rows[name] |= {"verdict": MISSING}
            continue
        rows[name] |= {
            "seeds": f"{one.seeds} of {most}" if one.seeds < most else one.seeds,
            both[0]: one.baseline,
            both[1]: one.mean,
            "difference": one.difference,
            "gain": "-" if math.isnan(one.relative) else f"{one.relative:+.1%}",
            "d": f"{one.standardised:+.2f}",
            "p by Holm": "< 0.0001" if one.p_holm < 1e-4 else f"{one.p_holm:.4f}",
            "verdict": one.verdict,
        }
    if all(row.get("guidance") in (None, "0") for row in rows.values()):
        for row in rows.values():
            row.pop("guidance", None)
    return rows | {what: {"verdict": MISSING} for what in question.missing}


def not_chosen_table(results: Results, counted: Results) -> Rows:
    """The setups whose test rows were ranked in `results` and are not among those that count."""
    seeds: dict[Cell, int] = {}
    for cell, split in results.lines.keys() - counted.lines.keys():
        seeds[setup_of(cell)] = seeds.get(setup_of(cell), 0) + (split == TEST)
    setups = [one for one in results.setups(TEST) if one in seeds]
    return {
        name: {
            "alpha": _plainly(one.alpha),
            "guidance": _plainly(one.guidance),
            "cells": seeds[one],
            "verdict": "not chosen",
        }
        for one, name in named(setups).items()
    }


def _alphas(setup: Cell, baseline: Cell) -> str | None:
    """Of an aligned baseline, where it is another, both; how one was trained, where otherwise."""
    own = _plainly(setup.alpha)
    otherwise = told_apart(baseline, [_as(baseline, setup), baseline], TRAINED_ALIKE)
    of = f" of {otherwise}" if otherwise and baseline.is_llm else ""
    differ = setup.alpha and baseline.alpha and baseline.alpha != setup.alpha
    return f"{own} against {baseline.alpha:g}{of}" if differ or of else own


def _as(baseline: Cell, setup: Cell) -> Cell:
    """The baseline, trained as the setup."""
    return dataclasses.replace(baseline, **{name: getattr(setup, name) for name in TRAINED_ALIKE})


def _plainly(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def model_table(results: Results, data: str, split: str = TEST) -> Rows:
    """All models on the rows of some data: mean over seeds, interval, what seeds differ by."""
    setups = results.setups(split, data=data)
    cells = [cell for one in setups for cell in results.cells(one, split)]
    for one in cells:
        results.check_same_rows(cells[0], one, split)
    metric = results.metric(split)
    hr = metric.replace("ndcg", "hr")
    values = {
        one: np.stack([results.values(cell, split, metric) for cell in results.cells(one, split)])
        for one in setups
    }
    if not values:
        return {}
    user_R = results.ranks(cells[0], split).user_R
    intervals = means_over_seeds(values, user_R)
    rows: dict[str, dict[str, Shown]] = {}
    for setup in setups:
        name = in_words(setup, setups, OF_TRAINING)
        if setup.is_llm:
            name += f", alpha {setup.alpha or 0:g}"
            name += f", guidance {setup.guidance:g}" if setup.guidance else ""
        of_seeds = [line.metrics for line in results.of_setup(setup, split)]
        rows[name.removeprefix(f"{data}, ")] = {
            "seeds": len(of_seeds),
            hr.upper(): float(np.mean([of[hr] for of in of_seeds])),
            f"{metric.upper()}, 95% interval": intervals[setup],
            "over seeds": _deviation(values[setup].mean(axis=1)),
            "NLL": results.mean(setup, split, NLL),
            "core-hours": core_hours(results.of_setup(setup, split)),
        }
    return rows


def _deviation(mean_S: np.ndarray) -> str | None:
    return f"± {np.std(mean_S, ddof=1):.4f}" if len(mean_S) > 1 else None


def means_over_seeds(values: Mapping[Name, np.ndarray], user_R: np.ndarray) -> dict[Name, Interval]:
    """The means of float [S, R] with their intervals for other users and other seeds."""
    spread = {name: seed_spread({name: one}, user_R)[name] for name, one in values.items()}
    means = {name: one.mean(axis=0) for name, one in values.items()}
    return bootstrap_intervals(means, user_R, spread=spread)


def best_in_words(results: Results, data: str) -> str:
    """One sentence: the LLM that is best on validation rows, on the test rows, against the rest.

    '' if no LLM was ranked on the test rows.
    """
    llms = [one for one in _llms(results) if one.data == data]
    if not llms:
        return ""
    metric = results.metric(TEST)

    def on(split: str, setup: Cell) -> float:
        lines = results.of_setup(setup, split)
        return float(np.mean([line.metrics[metric] for line in lines])) if lines else -math.inf

    best = max(llms, key=lambda one: (on(VALIDATION, one), on(TEST, one)))
    others = [one for one in results.setups(TEST, data=data) if not one.is_llm]
    found = effects(results, {one: (best, one) for one in others}, TEST, (metric,))
    parts = []
    for one in (one for one in others if (one, metric) in found):
        effect = found[one, metric]
        words = "most popular" if one.recommender == POPULAR else str(one.cf)
        low, high = effect.difference.low, effect.difference.high
        verdict = {True: "better than", False: "worse than", None: "not shown to differ from"}
        parts.append(
            f"{verdict[effect.is_better]} {words} "
            f"({effect.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}])"
        )
    validated = results.cells(best, VALIDATION)
    chosen = " on the validation rows" if validated else " on these rows themselves"
    name = in_words(best).removeprefix(f"{data}, ")
    how = f"alpha {best.alpha or 0:g}, guidance {best.guidance or 0:g}, {best.steps} steps"
    against = f": {'; '.join(parts)}" if parts else ""
    seeds = len(results.cells(best, TEST))
    return (
        f"On {data} the LLM that is best{chosen} ({name}; {how}) has "
        f"{metric.upper()} {on(TEST, best):.4f} on the test rows{against}. "
        f"{'One seed.' if seeds == 1 else f'{seeds} seeds.'}"
    )


def cost_table(results: Results) -> Rows:
    """What each recommender cost on each data; a run that several cells share counts once."""
    groups: dict[str, list[Line]] = {}
    for (cell, _), line in results.lines.items():
        groups.setdefault(f"{cell.data}, {cell.recommender}", []).append(line)
    rows: dict[str, dict[str, Shown]] = {
        name: {
            "cells": len(lines),
            "runs": len({line.run for line in lines if line.run}),
            "core-hours": round(core_hours(lines), 2),
            "machine": ", ".join(dict.fromkeys(line.machine for line in lines)),
        }
        for name, lines in groups.items()
    }
    total = round(core_hours(results.lines.values()), 2)
    return rows | {"all": {"cells": len(results.lines), "core-hours": total}}


def core_hours(lines: Iterable[Line]) -> float:
    """Core-hours of steps of LLM training, of ranking and of what else was measured."""
    training: dict[str, float] = {}
    total = 0.0
    for line in lines:
        seconds = sum(line.seconds.values())
        cores = line.core_seconds / seconds if seconds else 0.0
        train = line.seconds.get("train", 0.0)
        total += cores * (seconds - train)
        training[line.run] = max(training.get(line.run, 0.0), cores * train)
    return (total + sum(training.values())) / 3600


def most_seeds(results: Results, split: str = TEST) -> int:
    """Of any LLM setup."""
    return max((len(results.cells(one, split)) for one in _llms(results, split)), default=0)


def as_json(question: Question) -> dict:
    """What results.json holds of a question."""
    return {
        "effects": [
            {
                "setup": dataclasses.asdict(setup),
                "compared with": dataclasses.asdict(question.compared[setup]),
                "metric": metric,
                **_finite(one),
                "verdict": one.verdict,
            }
            for (setup, metric), one in question.effects.items()
        ],
        "missing": list(question.missing),
    }


def _finite(one: Effect) -> dict:
    fields = one._asdict()
    return fields | {"relative": None if math.isnan(one.relative) else one.relative}
