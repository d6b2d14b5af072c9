"""Says what a work directory holds, what it was made from, and what is stale and why.

    python launch/status.py --workdir=runs/quickstart

Data, CF logits, LLM runs (steps, who trains them), hidden states, evaluation lists, results and
exports below the work directory, or those of the data sets of a grid. Nothing is loaded or written.
"""

import sys
from pathlib import Path

from absl import app, flags

from tca4rec_jax.experiments.results import workdirs
from tca4rec_jax.reporting import show, show_table
from tca4rec_jax.status import Status

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory.", required=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        workdir = Path(_WORKDIR.value)
        rows = {
            str(folder.relative_to(workdir) / name): cells
            for folder in workdirs(workdir)
            for name, cells in Status(folder).rows().items()
        }
    except OSError as error:
        show(f"status: {error}", error=True)
        sys.exit(1)
    if not rows:
        show(f"{_WORKDIR.value} holds nothing yet: begin with launch/prepare_data.py")
        return
    show_table(rows, title=_WORKDIR.value, first_column="artefact")


if __name__ == "__main__":
    app.run(main)
