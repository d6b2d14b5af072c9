"""Says what a work directory holds, what it was made from, and what is stale and why.

    python launch/status.py --workdir=runs/quickstart

Data, CF logits, LLM runs (steps, who trains them), hidden states, evaluation lists, results and
exports below the work directory. Nothing is loaded or written.
"""

import sys
from pathlib import Path

from absl import app, flags

from tca4rec_jax.reporting import show, show_table
from tca4rec_jax.status import Status

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory.", required=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        rows = Status(Path(_WORKDIR.value)).rows()
    except OSError as error:
        show(f"status: {error}", error=True)
        sys.exit(1)
    if not rows:
        show(f"{_WORKDIR.value} holds nothing yet: begin with launch/prepare_data.py")
        return
    show_table(rows, title=_WORKDIR.value, first_column="artefact")


if __name__ == "__main__":
    app.run(main)
