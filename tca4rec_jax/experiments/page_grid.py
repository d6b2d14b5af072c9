"""What the page of a grid says of it: what was done, what is missing, what it was made of."""

import dataclasses
import json
import shlex
from collections import Counter
from typing import Any

from tca4rec_jax.evaluation.page_runs import settings
from tca4rec_jax.experiments import tables
from tca4rec_jax.experiments.runner import Plan
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.pages.blocks import Block, Command, Numbers, Text
from tca4rec_jax.reporting import Rows
from tca4rec_jax.training.run_folder import RunFolder

FIRST = "data, recommender, CF model"


def opening(results: Results, grid: str) -> list[Block]:
    """What the page was made of; with the `grid` the command that made that."""
    lines = results.lines.values()
    rows = {f"{one.rows} {one.split} rows of {one.cell.data}": None for one in lines}
    words = (
        f"This page is written by `launch/experiments_report.py` from the {len(results.lines)} "
        f"lines of a grid's results.jsonl: {', '.join(rows)}; "
        f"{tables.core_hours(lines):.1f} core-hours."
    )
    if not grid:
        return [Text(words)]
    flags = f"--grid={grid}", f"--workdir={results.workdir}"
    command = shlex.join(["python", "launch/experiments.py", *flags])
    return [Text(f"{words} They were made by"), Command(command)]


def missing(plan: Plan) -> list[Block]:
    """How many cells of the grid, and which; what waits for other slices of the grid."""
    to_come = f"; {plan.to_come} more follow once values are chosen" if plan.to_come else ""
    counts = Counter(
        (f"{cell.data}, {cell.recommender}, {cell.cf or 'alpha = 0'}", split)
        for cell, split in plan.missing
    )
    rows: dict[str, dict[str, int]] = {}
    for (name, split), count in counts.items():
        rows.setdefault(name, {})[f"{split} rows"] = count
    table = [Numbers(rows, FIRST)] if rows else []
    waits = f"; {plan.waits}" if plan.waits else ""
    return [Text(f"{len(plan.missing)} cells of the grid{to_come}{waits}."), *table]


def made_from(results: Results) -> list[Block]:
    """What the runs' configs have otherwise than the defaults, and the versions of packages."""
    runs: dict[str, dict[str, RunFolder]] = {}
    for line in results.lines.values():
        run = RunFolder(results.workdir / line.run)
        if line.run and run.config_path.is_file():
            name = f"{line.cell.data}, {line.cell.recommender}"
            runs.setdefault(name, {})[line.run] = run
    changed = settings({name: [run.config for run in of.values()] for name, of in runs.items()})
    versions: dict[str, dict[str, None]] = {}
    for line in results.lines.values():
        for package, version in line.made_from.versions.items():
            versions.setdefault(package, {})[version] = None
    of_packages: Rows = {name: {"version": ", ".join(of)} for name, of in versions.items()}
    words = f"Settings of LLM runs: {len(changed)} fields that differ from the defaults"
    return [
        *([Numbers(changed, "field", words, is_closed=True)] if changed else []),
        *([Numbers(of_packages, "package")] if of_packages else []),
    ]


def copied(results: Results) -> str:
    """The lines in the order of their cells, with what was measured since, without blanks."""
    lines = sorted(results.lines.values(), key=lambda line: (line.cell.label, line.split))
    short: dict[str, Any] = {"allow_nan": False, "separators": (",", ":")}
    return "".join(json.dumps(dataclasses.asdict(line), **short) + "\n" for line in lines)
