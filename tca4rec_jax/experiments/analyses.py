"""Where an effect comes from, and when: slices of the rows, decisions of a title, training.

Axis letters: R rows, S seeds, N validations, K decisions of a title.
"""

from typing import Any, NamedTuple

import numpy as np

from tca4rec_jax.evaluation.slices import LEAST_USERS, by_length, head_items
from tca4rec_jax.experiments.curves import PLAIN, Panels, Series
from tca4rec_jax.experiments.effects import Effect, paired_effects
from tca4rec_jax.experiments.measures import FLUENCY
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell, Line
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import Question, in_words, told_apart
from tca4rec_jax.fileio import read_json_lines
from tca4rec_jax.training.run_folder import RunFolder
from tca4rec_jax.training.validation import NLL as VALIDATED

WINDOWS = 10
"""Parts of a training whose batches a learning curve averages."""


def slice_effects(
    results: Results, question: Question, metric: str
) -> dict[str, dict[Cell, Effect]]:
    """{slice: {setup: effect}} of what a question compares, on the test rows.

    By popularity of the target and length of the history; p-values are not adjusted. A slice of
    all rows is left out, and one of fewer than LEAST_USERS users.
    """
    found: dict[str, dict[Cell, Effect]] = {}
    for data in dict.fromkeys(setup.data for setup in question.compared):
        columns = {}
        for setup, baseline in question.compared.items():
            both = results.paired(setup, baseline, TEST, metric) if setup.data == data else None
            if both is not None:
                columns[setup] = both
                cell = results.cells(setup, TEST)[0]
                facts, user_R = results.facts(cell, TEST), results.ranks(cell, TEST).user_R
        if not columns:
            continue
        head_R = head_items(facts.count_I)[facts.target_R]
        slices = {"head items": head_R, "tail items": ~head_R, **by_length(facts.history_R)}
        for name, inside_R in slices.items():
            if inside_R.all() or len(np.unique(user_R[inside_R])) < LEAST_USERS:
                continue
            inside = {
                setup: (ours[:, inside_R], theirs[:, inside_R])
                for setup, (ours, theirs) in columns.items()
            }
            alike = dict(zip(inside, (one.recommender for one in inside), strict=True))
            of_slice = paired_effects(inside, user_R[inside_R], alike=alike.__getitem__)
            found.setdefault(name, {}).update(of_slice)
    return found


def decision_panels(results: Results, question: Question) -> Panels:
    """How much likelier, in nats, each decision of the titles that came next has become.

    Those that fewer than LEAST_USERS of the rows have are left out.
    """
    panels: Panels = {}
    for setup, baseline in question.compared.items():
        gains: list[np.ndarray] = []
        for pair in results.pairs(setup, baseline, TEST):
            ours, theirs = (results.lines[cell, TEST].metrics.get(FLUENCY, {}) for cell in pair)
            rows_K = np.array(ours.get("rows by decision", ()))
            if rows_K.size and rows_K.tolist() == theirs.get("rows by decision"):
                both = np.array([theirs["nll by decision"], ours["nll by decision"]])
                gains.append(both[0, rows_K >= LEAST_USERS] - both[1, rows_K >= LEAST_USERS])
        if not gains or len({len(one) for one in gains}) > 1:
            continue
        gain_SxK = np.stack(gains)
        points = np.stack([gain_SxK.mean(axis=0), gain_SxK.min(axis=0), gain_SxK.max(axis=0)])
        x = [float(k) for k in range(1, gain_SxK.shape[1] + 1)]
        _add(panels, "gain in nats", setup, question, x, points)
    return panels


def speed_panels(results: Results, question: Question) -> Panels:
    """The learning curves of alpha = 0 and of aligned LLMs; mean over seeds.

    Of runs without validations that of the batches of training, "NLL, training".
    """
    panels: Panels = {}
    for setup in dict.fromkeys((*question.compared.values(), *question.compared)):
        curve = validation_curve(results, setup) or training_curve(results, setup)
        if curve is not None:
            nll_SxN = curve.nll_SxN
            points = np.stack([nll_SxN.mean(axis=0), nll_SxN.min(axis=0), nll_SxN.max(axis=0)])
            _add(panels, curve.name, setup, question, curve.steps, points)
    return panels


def _add(
    panels: Panels, name: str, setup: Cell, question: Question, x: list[float], points: np.ndarray
) -> None:
    panel = f"{setup.data}, {setup.recommender}"
    color = str(setup.cf) if setup.alpha else PLAIN
    drawn = *question.compared, *question.compared.values()
    style = told_apart(setup, [one for one in drawn if bool(one.alpha) == bool(setup.alpha)])
    line = Series(color, style, x, *points.tolist())
    panels.setdefault(name, {}).setdefault(panel, []).append(line)


class LearningCurve(NamedTuple):
    """The NLL of titles after so many steps; `name` says on which rows."""

    name: str
    steps: list[float]
    nll_SxN: np.ndarray  # float64


def validation_curve(results: Results, setup: Cell) -> LearningCurve | None:
    """Of the validations that the runs of all seeds have; None if there are not two."""
    validated = [
        {int(step): of[VALIDATED] for step, of in line.validations.items() if VALIDATED in of}
        for line in _lines(results, setup)
    ]
    return _curve("NLL, validation", validated)


def training_curve(results: Results, setup: Cell) -> LearningCurve | None:
    """Of the batches, in WINDOWS parts of the training, each at its last step.

    These are read from the runs' logs; runs of one seed read the same batches. None if the logs
    are not there.
    """
    runs = [RunFolder(results.workdir / line.run) for line in _lines(results, setup)]
    return _curve("NLL, training", [*map(_training_nll, runs)])


def _lines(results: Results, setup: Cell) -> list[Line]:
    """Of its runs: those of the test rows, or if these are not ranked of the validation rows."""
    return results.of_setup(setup, TEST) or results.of_setup(setup, VALIDATION)


def _curve(name: str, of_seeds: list[dict[int, float]]) -> LearningCurve | None:
    steps = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
    if len(steps) < 2:
        return None
    nll_SxN = np.array([[of[step] for step in steps] for of in of_seeds])
    return LearningCurve(name, [*map(float, steps)], nll_SxN)


def _training_nll(run: RunFolder) -> dict[int, float]:
    """{step: the mean NLL of the batches of one of WINDOWS parts that end there}."""
    log = {line["step"]: line for line in read_json_lines(run.log) if "nll_per_title" in line}
    parts = np.array_split(sorted(log), WINDOWS) if len(log) >= WINDOWS else []
    return {
        int(part[-1]) + 1: float(np.mean([log[step]["nll_per_title"] for step in part.tolist()]))
        for part in parts
    }


def speed_table(results: Results, question: Question) -> dict[str, dict[str, Any]]:
    """After how many steps an aligned LLM has the validation NLL with which alpha = 0 ends.

    Nothing of runs that were not validated: training batches are other rows at every step, and what
    is learned by heart counts.
    """
    rows: dict[str, dict[str, Any]] = {}
    for setup, baseline in question.compared.items():
        own, plain = validation_curve(results, setup), validation_curve(results, baseline)
        if own is None or plain is None:
            continue
        goal, last = float(plain.nll_SxN.mean(axis=0)[-1]), plain.steps[-1]
        reached = steps_to(own.steps, own.nll_SxN.mean(axis=0), goal)
        rows[in_words(setup, question.compared)] = {
            f"{own.name}, at the end, alpha = 0": goal,
            "aligned": float(own.nll_SxN.mean(axis=0)[-1]),
            "steps, alpha = 0": f"{last:.0f}",
            "steps to its NLL, aligned": "not reached" if reached is None else f"{reached:.0f}",
            "share of the steps": None if reached is None else f"{reached / last:.0%}",
        }
    return rows


def steps_to(steps: list[float], nll_N: np.ndarray, goal: float) -> float | None:
    """The first step, between those given by a straight line, at which the NLL is the goal.

    None if it is never as low; the first given step if it is as low there.
    """
    low = np.flatnonzero(nll_N <= goal)
    if not low.size:
        return None
    if low[0] == 0:
        return steps[0]
    at = [low[0], low[0] - 1]  # np.interp needs ascending values
    return float(np.interp(goal, nll_N[at], np.array(steps)[at]))
