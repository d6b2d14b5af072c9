"""Prompts that show candidates are trained, ranked among them, and asked for them."""

import numpy as np
import pytest
from recommenders.kinds import LAST, experiment_of
from tiny_workdir import ITEMS, make_workdir

from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation import evaluate
from tca4rec_jax.evaluation.compare import compare_results
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.evaluation.summary import summarise
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.train import train

SHOWN = {"prompt.templates": ("q{history}of{candidates}z{target}",), "prompt.candidates": 3}
AMONG = {"evaluation__candidates": 4, "evaluation__rows": 12, "decoding__exclude_history": True}
DENIED = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("candidates")
    make_workdir(workdir)
    fields = {name.replace(".", "__"): value for name, value in (LAST | SHOWN).items()}
    (workdir / "deny.txt").write_text(str(DENIED))
    fields["decoding__deny"] = str(workdir / "deny.txt")
    experiment = experiment_of("titles", workdir, "whole", **AMONG, **fields)
    train(experiment)
    return experiment


def test_every_model_ranks_the_same_candidates_by_the_same_filters(trained, monkeypatch):
    rankings = {}
    monkeypatch.setattr(
        evaluate, "summarise", lambda *given: rankings.update(given[2]) or summarise(*given)
    )
    results = evaluate_run(trained.config, trained.workdir)
    assert results["items"] == 4
    first, *_ = (trained.workdir / "results.md").read_text().splitlines()
    assert "ranked over 4 items that were drawn for it but those of its history; NLL" in first
    rows = EvaluationRows.of(trained)
    assert (rows.candidates_RxN == rows.target_R[:, None]).any(axis=1).all()
    assert {"Most popular", "CF model", "untrained", "trained"} == rankings.keys()
    for label, found in rankings.items():
        for row, target in enumerate(rows.target_R):
            left = {*rows.candidates_RxN[row]} - {*rows.histories[row]} - {DENIED}
            listed = [item for item in found.items_RxM[row].tolist() if item >= 0]
            assert {*listed} <= left, label
            assert len(listed) == min(len(left), trained.config.decoding.beams), label
            rank = found.rank_R[row]
            assert listed[rank : rank + 1] == [target] if target in listed else rank in (-1, 3)
    tests = compare_results([trained.workdir], baseline="CF model")["models"]
    assert tests.keys() == rankings.keys() - {"CF model"}


def test_candidates_are_scored_and_all_items_are_not_asked_for(trained):
    recommender = Recommender(trained, "whole")
    scores = recommender.score(["0", "3"], ["5", "2", "7"])
    assert np.isfinite(scores).all()
    with pytest.raises(UserError, match="show {candidates}, and there are none: evaluate with"):
        recommender.recommend(["0", "3"], k=ITEMS)


@pytest.mark.parametrize(
    ("candidates", "most", "message"),
    [
        ([["1", "2"], ["7", "9"]], None, "expected a list for each of 1 histories"),
        ([], None, "expected a list for each of 1 histories"),
        ("1", None, "expected a list for each of 1 histories"),
        ([["1", "2"]], 1, "expected as many of each history, at most 1, got 2 to 2"),
        ([[]], None, r"candidates is \[\]"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(trained, monkeypatch, candidates, most, message):
    monkeypatch.setattr(Experiment, "inference_decoder", None)
    with pytest.raises(UserError, match=message):
        Recommender(trained, "whole").scores([["0", "3"]], candidates, most=most)


def test_lists_of_candidates_that_differ_in_length_are_refused(trained):
    with pytest.raises(UserError, match="at most any number, got 1 to 2"):
        Recommender(trained, "whole").scores([["0"], ["3"]], [["1"], ["1", "2"]])


def test_an_evaluation_without_candidates_says_so(trained):
    config = trained.config.copy_and_resolve_references()
    config.evaluation.candidates = 0
    with pytest.raises(UserError, match="and there are none: evaluate with evaluation.candidates"):
        evaluate_run(config, trained.workdir, name="all")
