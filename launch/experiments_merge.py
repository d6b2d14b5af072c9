"""Takes over what another work directory of a grid of experiments has done and this one has not.

    python launch/experiments_merge.py --workdir=runs/claim --other=brought/claim

For places without a common disk that both went on. Reads --other, in which nobody may write and
which stays as it is. Writes into --workdir what that lacks: lines of results.jsonl whose cell and
split have none here, ranks and rows, data, CF models, and runs that are not here or are further
there. What is here stays.
"""

from pathlib import Path

from tca4rec_jax.experiments.merging import take_over
from tca4rec_jax.launching import WORKDIR, DEFINE_field, launch_alone
from tca4rec_jax.ranges import LocalPath
from tca4rec_jax.reporting import show

_OTHER = DEFINE_field("other", LocalPath, None, "The other work directory.")


def merge():
    """Takes over what is missing, and says how many lines."""
    lines = take_over(Path(_OTHER.value), Path(WORKDIR.value))
    show(f"experiments_merge: {lines} results of {_OTHER.value} are new in {WORKDIR.value}")


if __name__ == "__main__":
    required = ["workdir", "other"]
    launch_alone(merge, "experiments_merge", takes=[WORKDIR], required=required)
