"""A grid of experiments: data x CF model x recommender x alpha x seed and more, cell by cell.

    G=configs/experiments/claim.py W=runs/claim
    python launch/experiments.py --grid=$G --workdir=$W --dry_run
    python launch/experiments.py --grid=$G --workdir=$W --minutes=120

Says what is missing and what that will take, prepares data, trains CF models and LLM runs, ranks,
and appends a line to WORKDIR/results.jsonl for every finished cell. Killed at any time, the same
command goes on; several of them, on one host or several, share the cells (--devices=0,1 starts one
for each GPU). --grid=FILE:alpha=(0,0.1) changes an axis, :data=NAME takes a part, :debug shrinks
everything.
"""

import sys
from pathlib import Path

from absl import app, flags

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.runner import Plan, run_grid, say
from tca4rec_jax.experiments.workers import run_workers
from tca4rec_jax.launching import DRY_RUN, WORKDIR, DEFINE_field, start
from tca4rec_jax.ranges import NotNegative, Text
from tca4rec_jax.reporting import show
from tca4rec_jax.training.fault_tolerance import STOPPED, Stopped

_GRID = DEFINE_field("grid", Text, None, "The grid's file, :ARGUMENT after it.", required=True)
_MINUTES = DEFINE_field("minutes", NotNegative, 0.0, "Stop after so many; 0: when all is done.")
_DEVICES = flags.DEFINE_list("devices", [], "GPU numbers: a process works on each of them.")
_ANEW = flags.DEFINE_bool("anew", False, "Compute results anew whose inputs have changed.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        grid, workdir = load_grid(_GRID.value), Path(WORKDIR.value)
        if DRY_RUN.value:
            cells = Cells(grid, workdir)
            cells.check()
            return say(cells, Plan.of(cells))
        if _DEVICES.value:
            sys.exit(run_workers([*sys.argv, "--devices="], _DEVICES.value, workdir))
        start()
        run_grid(grid, workdir, minutes=_MINUTES.value, anew=_ANEW.value)
    except Stopped as stopped:
        show(f"experiments: {stopped}", error=True)
        sys.exit(STOPPED)
    except (OSError, UserError) as error:
        show(f"experiments: {error}", error=True)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main)
