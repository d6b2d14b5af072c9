"""The tiny grid on made data: seconds of work, for tests that kill it."""

import os
import string
from pathlib import Path

import numpy as np
import pandas as pd
from forked import Script

ROOT = Path(__file__).parents[1]
ITEMS = 12


def make_data(folder):
    """The argument of configs/experiments/tiny.py with data made in a folder."""
    rng = np.random.default_rng(0)
    interactions = {
        "user": np.repeat(np.arange(40), 8),
        "item": rng.integers(0, ITEMS, 320),
        "timestamp": np.arange(320),
    }
    pd.DataFrame(interactions).to_csv(folder / "interactions.csv", index=False)
    titles = [f"title {letter}" for letter in string.ascii_lowercase[:ITEMS]]
    pd.DataFrame({"item": range(ITEMS), "title": titles}).to_csv(folder / "items.csv", index=False)
    fields = {
        "source": "files",
        "interactions": folder / "interactions.csv",
        "catalogue": folder / "items.csv",
        "history_length": 4,
    }
    return ",".join(f"movielens.data.{name}={value}" for name, value in fields.items())


def start(workdir, argument, *flags):
    """launch/experiments.py on it, in a process of its own."""
    grid = f"{ROOT}/configs/experiments/tiny.py:{argument}"
    command = [f"{ROOT}/launch/experiments.py", f"--grid={grid}", f"--workdir={workdir}", *flags]
    return Script(command, dict(os.environ))
