"""Writes the page of a grid of experiments: tables with tests, pictures, numbers as JSON.

    python launch/experiments_report.py --workdir=runs/claim --output=results.md \\
        --grid=configs/experiments/claim.py

Reads what launch/experiments.py left in --workdir: results.jsonl, ranks, rows, agreement. Nothing
is trained or ranked, and what is missing there is shown as missing; with the --grid that was given
there, all that is. Writes the page --output, and beside it, in a folder of its name, pictures,
results.json, a copy of results.jsonl, and report.html, the page in one file for a browser.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.evaluation.page import FILE as REPORT
from tca4rec_jax.experiments.page import write_page
from tca4rec_jax.launching import WORKDIR, launch_alone
from tca4rec_jax.reporting import show

_OUTPUT = flags.DEFINE_string("output", None, "The page, a .md file.")
_GRID = flags.DEFINE_string("grid", "", "The grid's file, :ARGUMENT after it.")


def write():
    """Writes the page."""
    page = Path(_OUTPUT.value)
    write_page(Path(WORKDIR.value), page, grid=_GRID.value)
    show(f"experiments_report: wrote {page} and {page.with_suffix('') / REPORT}")


if __name__ == "__main__":
    required = ["workdir", "output"]
    launch_alone(write, "experiments_report", takes=[WORKDIR], required=required)
