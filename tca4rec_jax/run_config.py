"""The config of a trained run as a config file: --config=run_config.py:WORKDIR/llm/RUN.

Scripts that start from a run take it where --config is not given (launching.py).
"""

from pathlib import Path

from ml_collections import ConfigDict

from tca4rec_jax.experiment import config_of_run
from tca4rec_jax.training.run_folder import RunFolder


def get_config(path: str) -> ConfigDict:
    """The config of the run in a folder. Raises as `config_of_run`."""
    return config_of_run(RunFolder(Path(path)))
