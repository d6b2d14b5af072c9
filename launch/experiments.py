"""A grid of experiments: data x CF model x recommender x alpha x seed and more, cell by cell.

    G=configs/experiments/claim.py W=runs/claim
    python launch/experiments.py --grid=$G --workdir=$W --dry_run
    python launch/experiments.py --grid=$G --workdir=$W --minutes=120

Reads the grid's file, the configs that it names and their data. Says what is missing and what that
will take, prepares data, trains CF models and LLM runs, ranks. Writes WORKDIR: a folder for each
data set and a line of results.jsonl for every finished cell. Killed at any time, the same command
goes on; several of them, on one host or several, share the cells (--devices=0,1 starts one for each
GPU). --grid=FILE:alpha=(0,0.1) changes an axis; :data=NAME, cf=NAME or recommender=NAME takes a
part; :debug shrinks everything.
"""

import sys
from pathlib import Path

from absl import flags

from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.runner import Plan, run_grid, say
from tca4rec_jax.experiments.work import Work
from tca4rec_jax.experiments.workers import run_workers
from tca4rec_jax.launching import DRY_RUN, JOB, WORKDIR, DEFINE_field, launch_alone, start
from tca4rec_jax.ranges import NotNegative, Text

_GRID = DEFINE_field("grid", Text, None, "The grid's file, :ARGUMENT after it.")
_MINUTES = DEFINE_field("minutes", NotNegative, 0.0, "Stop after so many; 0: when all is done.")
_DEVICES = flags.DEFINE_list("devices", [], "GPU numbers: a process works on each of them.")
_ANEW = flags.DEFINE_bool("anew", False, "Compute results anew whose inputs have changed.")


def experiments():
    """Does what is missing of the grid, or says it."""
    grid, workdir = load_grid(_GRID.value), Path(WORKDIR.value)
    if DRY_RUN.value:
        cells = Cells(grid, workdir)
        cells.check()
        return say(cells, Plan.of(cells))
    if _DEVICES.value:
        sys.exit(run_workers([*sys.argv, "--devices="], _DEVICES.value, workdir))
    start()
    Work(Cells(grid, workdir)).measure_agreement()
    run_grid(grid, workdir, minutes=_MINUTES.value, anew=_ANEW.value)


if __name__ == "__main__":
    takes, required = [WORKDIR, DRY_RUN, *JOB], ["grid", "workdir"]
    launch_alone(experiments, "experiments", takes=takes, required=required)
