"""A tiny work directory with ratings, and configs of recommenders that answer yes or no."""

import shutil

import numpy as np
import pandas as pd
from tiny_workdir import make_config, make_workdir

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.data.dataset import load, prepare

TEMPLATES = {
    "tallrec": "a{liked}b{disliked}c{item}d{target}",
    "collm": "a{user}{history}c{item}{vector}d{target}",
}


def make_answers_workdir(path):
    """Data with ratings, and a CF model, whose logits stand beside it."""
    make_workdir(path)
    table = pd.read_csv(path / "interactions.csv")
    table["stars"] = np.random.default_rng(1).integers(1, 6, len(table))
    table.to_csv(path / "interactions.csv", index=False)
    shutil.rmtree(path / "data")
    shutil.rmtree(path / "cf")
    config = config_of(path, "any")
    prepare(config.data, path / "data")
    run_cf(config.cf, load(path / "data"), path, history_length=4)


def config_of(workdir, name, kind="tallrec", alpha=0.5, **fields):
    config = make_config(workdir, name)
    config.data.update(rating_column="stars", liked_above=3.0)
    config.cf.model = "bpr_mf"
    config.cf.max_epochs = 2
    config.recommender.update(name="answer", answers=("y", "n"))
    config.prompt.update(templates=(TEMPLATES[kind],), separator="z", placeholder="x")
    config.training.targets = "last"
    config.objective.update(alpha=alpha, form="cross_entropy", **fields)
    config.evaluation.variants = (("untrained", "", 0.0),)
    return config
