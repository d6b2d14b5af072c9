"""What a change of the setup does: paired differences over seeds and rows, tested, in words.

Axis letters: R rows, S seeds, U users.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.results import Cell
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.intervals import (
    Interval,
    Name,
    Spread,
    bootstrap_intervals,
    holm,
    randomisation_test,
    seed_spread,
)

LEVEL = 0.05
"""A difference is shown if its p-value, after Holm's correction, is below."""


class Effect(NamedTuple):
    """A mean difference (a setup less its baseline) of a metric over seeds and rows.

    Attributes:
      mean, baseline: the means of both.
      difference: with its 95% interval, for other users and other seeds.
      p, p_holm: of no difference (randomisation test), and adjusted for all tests made at once.
      standardised: the mean of the users' differences over their standard deviation (Cohen's d of
        paired samples), each user's averaged over rows and seeds; 0 if they have none.
      relative: the difference as a share of the baseline; NaN if that is 0.
      seeds: how many were compared.
      lower_is_better: what the metric is like.
    """

    mean: float
    baseline: float
    difference: Interval
    p: float
    p_holm: float
    standardised: float
    relative: float
    seeds: int
    lower_is_better: bool = False

    @property
    def is_better(self) -> bool | None:
        """Whether the setup is better than its baseline; None if no difference is shown."""
        if self.p_holm >= LEVEL:
            return None
        return (self.difference.mean < 0) == self.lower_is_better

    @property
    def verdict(self) -> str:
        """In words."""
        words = {True: "better", False: "worse", None: "no difference shown"}[self.is_better]
        return words if self.seeds > 1 else f"{words} (one seed)"


def effects(
    results: Results,
    compared: Mapping[Name, tuple[Cell, Cell]],
    split: str,
    metrics: Sequence[str],
    *,
    seed: int = 0,
) -> dict[tuple[Name, str], Effect]:
    """{(name, metric): effect} of setups and their baselines, where both have it.

    Holm's correction is over all that is returned; how much seeds move a metric is taken to be the
    same for all setups of a recommender and guidance on the same rows. A setup that is compared
    with several baselines is not pooled with itself: what its seeds do is the same each time, and
    tells once. Raises UserError as `Results.paired`.
    """
    users: dict[bytes, np.ndarray] = {}
    columns: dict[bytes, dict] = {}  # by the rows' users: those of the same rows are drawn once
    for name, (setup, baseline) in compared.items():
        for metric in metrics:
            paired = results.paired(setup, baseline, split, metric)
            if paired is not None:
                user_R = results.ranks(results.cells(setup, split)[0], split).user_R
                users[user_R.tobytes()] = user_R
                columns.setdefault(user_R.tobytes(), {})[name, metric] = paired
    tested: dict[tuple[Name, str], Effect] = {}
    times: Counter[Cell] = Counter()
    number: dict[Name, int] = {}
    for name, (setup, _) in compared.items():
        number[name] = times[setup]
        times[setup] += 1

    def alike(of: tuple[Name, str]) -> Hashable:
        name, metric = of
        setup, _ = compared[name]
        return setup.recommender, setup.guidance, metric, number[name]

    for rows, of_rows in columns.items():
        tested |= paired_effects(of_rows, users[rows], alike=alike, seed=seed)
    adjusted = holm({name: one.p for name, one in tested.items()})
    return {
        name: tested[name]._replace(p_holm=adjusted[name], lower_is_better=name[1] == NLL)
        for name in adjusted
    }


def paired_effects(
    columns: Mapping[Name, tuple[np.ndarray, np.ndarray]],
    user_R: np.ndarray,
    *,
    alike: Callable[[Name], Hashable] = lambda _: None,
    seed: int = 0,
) -> dict[Name, Effect]:
    """Of (setup, baseline) float64 [S, R], of the rows of users int [R]; p is not adjusted.

    Seeds are taken to do as much to all names for which `alike` gives the same.
    """
    differences = {name: ours - theirs for name, (ours, theirs) in columns.items()}
    means = {name: one_SxR.mean(axis=0) for name, one_SxR in differences.items()}
    groups: dict[Hashable, dict] = {}
    for name, one_SxR in differences.items():
        groups.setdefault(alike(name), {})[name] = one_SxR
    spread: dict[Name, Spread] = {}
    for group in groups.values():
        spread |= seed_spread(group, user_R)
    intervals = bootstrap_intervals(means, user_R, spread=spread, seed=seed)
    p_values = randomisation_test(means, user_R, spread=spread, seed=seed)
    found = {}
    for name, (ours_SxR, theirs_SxR) in columns.items():
        baseline, mean = float(theirs_SxR.mean()), intervals[name].mean
        found[name] = Effect(
            mean=float(ours_SxR.mean()),
            baseline=baseline,
            difference=intervals[name],
            p=p_values[name],
            p_holm=p_values[name],
            standardised=standardised(means[name], user_R),
            relative=mean / baseline if baseline else float("nan"),
            seeds=len(ours_SxR),
        )
    return found


def standardised(difference_R: np.ndarray, user_R: np.ndarray) -> float:
    """The mean of the users' mean differences over their standard deviation; 0 without any."""
    number_R, users = pd.factorize(user_R)
    of_user = np.bincount(number_R, difference_R) / np.bincount(number_R)
    deviation = np.std(of_user, ddof=1) if len(users) > 1 else 0.0
    return float(of_user.mean() / deviation) if deviation > 0 else 0.0
