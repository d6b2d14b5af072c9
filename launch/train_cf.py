"""Trains the CF model of a run, ranks with it, and writes its logits to WORKDIR/cf.

    python -m launch.train_cf --config=configs/quickstart.py --workdir=runs/quickstart

Needs WORKDIR/data (launch/prepare_data.py). A second run with the same settings reuses the files.
"""

import sys
from pathlib import Path

import rich.console
from absl import app, flags, logging
from ml_collections import config_flags

from tca4rec_jax.cf.run import results_table, run_cf
from tca4rec_jax.data.dataset import load

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Holds data/; results go to WORKDIR/cf.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    try:
        data = load(workdir / "data")
        metrics = run_cf(
            config.cf.to_dict(), data, workdir, history_length=config.data.history_length
        )
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"train_cf: {error}")
    console = rich.console.Console()
    console.print(results_table(metrics))
    console.print(f"CF logits and metrics are in {workdir / 'cf'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
