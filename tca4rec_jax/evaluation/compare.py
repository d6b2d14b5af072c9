"""Models of one or several evaluations on the same rows: paired differences, and their tests.

Axis letters: R rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.kept_rankings import KeptRankings, Ranks
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval, bootstrap_intervals, holm, randomisation_test
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.reporting import Cell, show_table, write_results


class PairedTest(NamedTuple):
    """A mean difference over rows, and how often as large a one comes without any difference."""

    difference: Interval
    p: float  # of the randomisation test
    p_holm: float  # adjusted for all tests of the comparison


def compare_results(
    folders: Sequence[Path],
    *,
    labels: Sequence[str] = (),
    baseline: str = "",
    cutoffs: Sequence[int] = (),
    hits: str = "item",
    seed: int = 0,
    output: Path | None = None,
) -> dict:
    """Compares the models of evaluations with a baseline, and shows the table.

    Args:
      folders: work directories, or folders results/NAME in them.
      labels: the models, by default all; see `models_of`.
      baseline: a model by its name or label, also besides `labels`; by default the first.
      cutoffs: K, by default the largest that all were evaluated at.
      hits: as evaluation.hits.
      output: the folder of comparison.json and comparison.md; None writes nothing.

    Returns what comparison.json holds. Raises UserError as `models_of`, for a baseline that is
    not one of the models, and for a K beyond the lists.
    """
    tables = [KeptRankings.read(folder) for folder in folders]
    for table in tables:
        tables[0].check_same_rows(table, hits)
    models = models_of(tables, [*labels, baseline] if labels and baseline else labels)
    longest = min(table.longest for table in tables)
    cutoffs, baseline = tuple(cutoffs) or (longest,), _named(models, baseline)
    if beyond := [k for k in cutoffs if k > longest]:
        raise UserError(f"--cutoff is {beyond[0]}, but the lists were evaluated up to {longest}")
    user_R = tables[0].user_R
    found = compare(models, baseline, user_R, cutoffs, hits=hits, seed=seed)
    inputs = {
        "tables": {str(table.folder): table.made_from.fingerprint for table in tables},
        "models": list(models),
        **{"baseline": baseline, "cutoffs": cutoffs, "hits": hits, "seed": seed},
    }
    made_from = Provenance("comparison", "launch/compare.py", inputs)
    results = {
        "rows": len(user_R),
        "baseline": baseline,
        "models": {
            name: {metric: one._asdict() for metric, one in tests.items()}
            for name, tests in found.items()
        },
        "provenance": dataclasses.asdict(made_from),
    }
    title = (
        f"Differences from {baseline}: {len(user_R)} rows of {len(np.unique(user_R))} users, hits "
        f"by {hits}; 95% intervals and randomisation tests over users, Holm's correction"
    )
    text = show_table(_table(found), title=title, first_column="model")
    if output is not None:
        write_results(output / "comparison.json", results)
        write_text(output / "comparison.md", text)
    return results


def _table(found: Mapping[str, Mapping[str, PairedTest]]) -> dict[str, dict[str, Cell]]:
    """A row for every model and metric."""
    return {
        f"{name}: {'NLL' if metric == NLL else metric.upper()}": {
            "difference": one.difference,
            "p": one.p,
            "p by Holm": one.p_holm,
        }
        for name, tests in found.items()
        for metric, one in tests.items()
    }


def models_of(tables: Sequence[KeptRankings], labels: Sequence[str] = ()) -> dict[str, Ranks]:
    """The models of tables of the same rows, or those with these labels.

    Of several tables a name is 'FOLDER: LABEL', and `labels` may be either. One that an earlier
    table has by the same label, with the same ranks and likelihoods, as "Most popular", is there
    once, unless `labels` have its name. Raises UserError for a label that none has.
    """
    found: dict[str, Ranks] = {}
    taken: list[tuple[str, Ranks]] = []
    there: dict[str, None] = {}
    for table in tables:
        for label, ranks in table.models.items():
            name = f"{table.folder}: {label}" if len(tables) > 1 else label
            there |= {label: None, name: None}
            again = any(label == other and _equal(ranks, one) for other, one in taken)
            if name in labels or (not again and (not labels or label in labels)):
                found[name] = ranks
                taken.append((label, ranks))
    if unknown := [label for label in labels if label not in there]:
        raise UserError(f"no table has a model {unknown[0]!r}: there are {[*there]}")
    return found


def _named(models: Mapping[str, Ranks], baseline: str) -> str:
    """The name of a baseline by its name or its label, '' the first; UserError unless it is one."""
    names = [name for name in models if baseline in ("", name) or name.endswith(f": {baseline}")]
    if (len(names) != 1 and baseline) or len(models) < 2:
        raise UserError(
            f"a difference needs one baseline ({baseline or 'the first'!r}) and another model: "
            f"there are {[*models]}"
        )
    return names[0]


def compare(
    models: Mapping[str, Ranks],
    baseline: str,
    user_R: np.ndarray,
    cutoffs: Sequence[int],
    *,
    hits: str = "item",
    seed: int = 0,
) -> dict[str, dict[str, PairedTest]]:
    """{model: {'hr@K' | 'ndcg@K' | 'nll per title': paired difference, model - baseline}}.

    With intervals and tests that take users as a whole, and Holm's correction over all tests that
    are returned. `hits` is as evaluation.hits.
    """
    values = {
        (name, metric): value_R
        for name, ranks in models.items()
        if name != baseline
        for metric, value_R in ranks.differences(models[baseline], cutoffs, hits).items()
    }
    intervals = bootstrap_intervals(values, user_R, seed=seed)
    p_values = randomisation_test(values, user_R, seed=seed)
    adjusted = holm(p_values)
    found: dict[str, dict[str, PairedTest]] = {name: {} for name in models if name != baseline}
    for name, metric in values:
        key = name, metric
        found[name][metric] = PairedTest(intervals[key], p_values[key], adjusted[key])
    return found


def _equal(one: Ranks, other: Ranks) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))
