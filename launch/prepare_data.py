"""Prepares the data of a run: reads the source, makes the splits, writes WORKDIR/data.

    python launch/prepare_data.py --config=configs/quickstart.py --workdir=runs/quickstart

A second run with the same settings reuses the files; with other settings it stops and says so.
"""

import rich

from tca4rec_jax.data.dataset import prepare, summary_table
from tca4rec_jax.launching import launch


def main(config, workdir):
    """Prepares the data and prints their sizes."""
    rich.print(summary_table(prepare(config.data, workdir / "data")))


if __name__ == "__main__":
    launch(main, "prepare_data", run_on="main_process", reads=["source"], writes=["data"])
