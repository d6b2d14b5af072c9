"""Trains the CF model of a run, ranks with it, and writes its logits to WORKDIR/cf.

    python launch/train_cf.py --config=configs/quickstart.py --workdir=runs/quickstart

Needs WORKDIR/data (launch/prepare_data.py). A second run with the same settings reuses the files.
"""

import rich

from tca4rec_jax.cf.run import results_table, run_cf
from tca4rec_jax.data.dataset import load
from tca4rec_jax.launching import launch


def main(config, workdir):
    data = load(workdir / "data")
    metrics = run_cf(config.cf.to_dict(), data, workdir, history_length=config.data.history_length)
    rich.print(results_table(metrics))


if __name__ == "__main__":
    launch(main, "train_cf")
