"""Says what a work directory holds, what it was made from, and what is stale and why.

    python launch/status.py --workdir=runs/quickstart

Reads what is noted beside data, CF logits, LLM runs (steps, who trains them), hidden states,
evaluation lists, results and exports below the work directory, or those of the data sets of a grid.
Writes nothing.
"""

from pathlib import Path

from tca4rec_jax.experiments.results import workdirs
from tca4rec_jax.launching import WORKDIR, launch_alone
from tca4rec_jax.reporting import show, show_table
from tca4rec_jax.status import Status


def status():
    """Shows a line for every part of the work directory."""
    workdir = Path(WORKDIR.value)
    rows = {
        str(folder.relative_to(workdir) / name): cells
        for folder in workdirs(workdir)
        for name, cells in Status(folder).rows().items()
    }
    if rows:
        show_table(rows, title=WORKDIR.value, first_column="artefact")
    else:
        show(f"{workdir} holds nothing yet: begin with launch/prepare_data.py")


if __name__ == "__main__":
    launch_alone(status, "status", takes=[WORKDIR], required=["workdir"])
