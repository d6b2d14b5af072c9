"""Trains the LLM: python launch/train.py --config=configs/quickstart.py:alpha=0.1 --workdir=runs/x

Needs prepare_data and train_cf in the same work directory. Goes on from its own last checkpoint.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from tca4rec_jax.launching import start
from tca4rec_jax.training.run import Run, train_run

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)


def main(_):
    start()
    train_run(Run(_CONFIG.value, Path(_WORKDIR.value)))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
