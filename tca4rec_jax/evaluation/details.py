"""details.md and slices.png: every metric at every K, what the lists are like, calibration, slices.

results.json holds the same numbers.
"""

from collections.abc import Mapping
from pathlib import Path

from tca4rec_jax.evaluation.pictures import intervals_figure
from tca4rec_jax.fileio import write_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import Cell, Rows, markdown_table, save_figure

ABOUT = {
    "by item": "HR, NDCG and MRR by item",
    "by title": "HR, NDCG and MRR by title",
    "lists": "The lists: recall of the targets of the user's rows from then on, novelty in bits, "
    "popularity in training interactions, diversity, coverage, Gini index, popularity lift over "
    "the histories",
    "calibration": "Calibration of the CF models over the whole catalogue: probability of their "
    "first K items, how often the target is there, expected calibration error",
}
"""The sections of a model's metrics that have a K, and what they are."""


def write_details(folder: Path, results: Mapping, metric: str) -> None:
    """Writes details.md, and slices.png of one metric if there are slices."""
    models = results["models"]
    parts = [f"# {results['rows']} {results['split']} rows of {results['users']} users\n"]
    for section, heading in ABOUT.items():
        table = {label: one[section] for label, one in models.items() if one.get(section)}
        if table:
            by_k = markdown_table(by_cutoff(table), first_column="model")
            parts += [f"## {heading}\n", by_k]
    of_slices = by_slice(results, metric)
    parts += [
        f"## {metric.upper()} by slice, 95% interval over users\n",
        markdown_table(
            {
                name: {"rows": results["slices"].get(name, results["rows"]), **row}
                for name, row in of_slices.items()
            },
            first_column="slice",
        ),
    ]
    write_text(folder / "details.md", "\n".join(parts))
    save_figure(folder / "slices.png", intervals_figure(of_slices, metric.upper()))


def by_slice(results: Mapping, metric: str) -> dict[str, dict[str, Interval]]:
    """{slice, first 'all': {model: interval}}."""
    models, hits = results["models"], f"by {results['hits']}"
    found = {"all": {label: one[hits][metric] for label, one in models.items()}}
    for name in results["slices"]:
        found[name] = {label: one["slices"][name][metric] for label, one in models.items()}
    return found


def by_cutoff(table: Mapping[str, Mapping[str, Cell]]) -> Rows:
    """A table of metrics 'name@K', without intervals: a row for every model and K."""
    rows: dict[str, dict[str, Cell]] = {}
    for label, metrics in table.items():
        for name, value in metrics.items():
            kind, _, k = name.partition("@")
            mean = value.mean if isinstance(value, Interval) else value
            rows.setdefault(f"{label}, K = {k}", {})[kind] = mean
    return rows
