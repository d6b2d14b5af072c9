"""Prepares the data of a run: reads the source, makes the splits, writes WORKDIR/data.

    python -m launch.prepare_data --config=configs/quickstart.py --workdir=runs/quickstart

A second run with the same settings reuses the files; with other settings it stops and says so.
"""

import sys
from pathlib import Path

import rich.console
from absl import app, flags, logging
from ml_collections import config_flags

from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.data.downloads import DownloadError
from tca4rec_jax.data.summary import summary_table

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The data are written to WORKDIR/data.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    data_dir = Path(_WORKDIR.value) / "data"
    try:
        data = prepare(_CONFIG.value.data, data_dir)
    except (ValueError, FileNotFoundError, DownloadError) as error:
        sys.exit(f"prepare_data: {error}")
    console = rich.console.Console()
    console.print(summary_table(data))
    console.print(f"The data are in {data_dir}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
