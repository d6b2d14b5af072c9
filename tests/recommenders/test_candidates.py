"""Prompts that show candidates are trained, ranked among them, and asked for them."""

import json

import numpy as np
import pytest
from recommenders.kinds import LAST, experiment_of
from tiny_workdir import ITEMS, make_workdir

from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.train import train

SHOWN = {"prompt.templates": ("q{history}of{candidates}z{target}",), "prompt.candidates": 3}
AMONG = {"evaluation__candidates": 4, "evaluation__rows": 12, "decoding__exclude_history": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("candidates")
    make_workdir(workdir)
    fields = {name.replace(".", "__"): value for name, value in (LAST | SHOWN).items()}
    experiment = experiment_of("titles", workdir, "whole", **AMONG, **fields)
    train(experiment)
    return experiment


def test_a_target_is_ranked_among_its_candidates(trained):
    evaluate_run(trained.config, trained.workdir)
    results = json.loads((trained.workdir / "results.json").read_text())
    assert results["items"] == 4
    rows = EvaluationRows.of(trained)
    assert (rows.candidates_RxN == rows.target_R[:, None]).any(axis=1).all()
    (file,) = (trained.workdir / "evaluation").glob("whole_*.npz")
    with np.load(file) as saved:
        items_RxM, rank_R = saved["items_RxM"][0], saved["rank_R"][0]
    for shown, items, rank, target in zip(
        rows.candidates_RxN, items_RxM, rank_R, rows.target_R, strict=True
    ):
        assert {*items} <= {*shown}
        assert rank == (items.tolist().index(target) if target in items else -1)


def test_candidates_are_scored_and_all_items_are_not_asked_for(trained):
    recommender = Recommender(trained, "whole")
    scores = recommender.score(["0", "3"], ["5", "2", "7"])
    assert np.isfinite(scores).all()
    with pytest.raises(UserError, match="show {candidates}, and there are none: evaluate with"):
        recommender.recommend(["0", "3"], k=ITEMS)


def test_an_evaluation_without_candidates_says_so(trained):
    config = trained.config.copy_and_resolve_references()
    config.evaluation.candidates = 0
    with pytest.raises(UserError, match="and there are none: evaluate with evaluation.candidates"):
        evaluate_run(config, trained.workdir, name="all")
