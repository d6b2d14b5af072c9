"""Writes the page of a grid of experiments: tables with tests, pictures, numbers as JSON.

    python launch/experiments_report.py --workdir=runs/claim --output=results.md \\
        --grid=configs/experiments/claim.py

Reads what launch/experiments.py left in --workdir: results.jsonl, ranks, rows. Nothing is trained
or ranked, and what is missing there is shown as missing; with the --grid that was given there, all
that is. Pictures and results.json lie in the folder of the page's name beside it.
"""

import sys
from pathlib import Path

from absl import app, flags

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.page import write_page
from tca4rec_jax.reporting import show

_WORKDIR = flags.DEFINE_string("workdir", None, "The grid's work directory.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The page, a .md file.", required=True)
_GRID = flags.DEFINE_string("grid", "", "The grid's file, :ARGUMENT after it.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        write_page(Path(_WORKDIR.value), Path(_OUTPUT.value), grid=_GRID.value)
        show(f"experiments_report: wrote {_OUTPUT.value}")
    except (OSError, UserError) as error:
        show(f"experiments_report: {error}", error=True)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
