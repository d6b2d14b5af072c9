"""Recommenders that answer yes or no score candidates after new histories."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from forked import Script
from recommenders.tiny_answers import TEMPLATES, config_of, make_answers_workdir

from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.decoding import candidate_questions
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.search_programs import search_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.evaluation.rankings import EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.recommenders.answer import Questions
from tca4rec_jax.train import train

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("answer")
    make_answers_workdir(path)
    return path


@pytest.mark.parametrize("kind", TEMPLATES)
def test_candidates_are_scored_as_in_an_evaluation(workdir, kind, monkeypatch):
    """After histories as the evaluated rows' are, with guidance and without."""
    name = f"scored_{kind}"
    config = config_of(workdir, name, kind)
    config.evaluation.update(rows=0, variants=(("alone", name, 0.0), ("guided", name, 1.0)))
    experiment = Experiment(config, workdir)
    train(experiment)
    evaluate_run(config, workdir, name=name)
    (kept,) = (workdir / "evaluation").glob(f"{name}_*.npz")
    alone_R, guided_R = np.load(kept)["score_R"]
    rows = EvaluationRows.of(experiment)
    questions = Questions(experiment.data.splits["test"], 12, config)
    row_R = np.searchsorted(questions.position_R, rows.position_R)
    split = questions.sequences.take(row_R)
    names = np.array(experiment.data.catalogue.item_ids)
    histories = [names[split.items[a : b - 1]].tolist() for a, b in pairwise(split.offsets)]
    liked = [split.liked[a : b - 1] for a, b in pairwise(split.offsets)]
    given = {"liked": liked if kind == "tallrec" else None}
    candidates = names[questions.asked.item_R[row_R]][:, None].tolist()
    recommender = Recommender(experiment, name)
    scores_Rx1 = recommender.scores(histories, candidates, **given)
    np.testing.assert_allclose(scores_Rx1[:, 0], alone_R, atol=1e-5)
    assert np.ptp(alone_R) > 1e-3
    monkeypatch.setattr(Experiment, "cf_store", None)  # which may be of another CF model
    scores_Rx1 = recommender.scores(histories, candidates, guidance=1.0, **given)
    np.testing.assert_allclose(scores_Rx1[:, 0], guided_R, atol=1e-4)
    assert np.abs(guided_R - alone_R).max() > 1e-2

    # Several candidates of a history are as each alone; their number compiles nothing.
    one = {"liked": liked[0].tolist() if kind == "tallrec" else None}
    expected = [recommender.score(histories[0], [item], **one)[0] for item in names[:7]]
    recommender.score(histories[0], names[:5].tolist(), **one)
    before = search_batch._cache_size()
    found = recommender.score(histories[0], names[:7].tolist(), **one)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert search_batch._cache_size() == before


def test_a_cf_model_that_cannot_be_calibrated_is_refused_before_the_llm_is_read(
    workdir, monkeypatch
):
    def refuse(scores_R, yes_R):
        raise UserError("one answer only")

    monkeypatch.setattr(candidate_questions, "calibrate", refuse)
    monkeypatch.setattr(Experiment, "inference_decoder", None)
    recommender = Recommender(Experiment(config_of(workdir, "refused", alpha=0.0), workdir), "")
    with pytest.raises(UserError, match="one answer only"):
        recommender.scores([["3"]], [["1"]], guidance=0.5)


def test_a_short_history_has_the_room_of_a_full_one(workdir):
    """So that both are read by one program."""
    config = config_of(workdir, "short", "collm", alpha=0.0)
    config.prompt.update(templates=("a{history}c{item}d{target}",), item=" {title}{vector}")
    recommender = Recommender(Experiment(config, workdir), "")
    for history in (["3"], ["3", "5", "4", "7", "2"]):
        items = Ragged.of([recommender.find(history, "history")])
        rows = recommender._questions.rows(items, np.array([[1, 2]]), None, None)
        assert rows.soft.most == config.data.history_length + 1


def test_a_history_without_ratings_is_liked(workdir):
    experiment = Experiment(config_of(workdir, "all_liked", alpha=0.0), workdir)
    recommender = Recommender(experiment, "")
    expected = recommender.score(["3", "5"], ["1", "2"], liked=[True, True])
    np.testing.assert_array_equal(recommender.score(["3", "5"], ["1", "2"]), expected)
    other = recommender.score(["3", "5"], ["1", "2"], liked=[True, False])
    assert np.abs(other - expected).min() > 1e-5
    with pytest.raises(UserError, match="a truth value for every item"):
        recommender.score(["3", "5"], ["1", "2"], liked=[True])
    with pytest.raises(UserError, match="a truth value for every item"):
        recommender.score(["3", "5"], ["1", "2"], liked=True)
    config = config_of(workdir, "all_liked", alpha=0.0)
    config.prompt.templates = ("a{history}c{item}d{target}",)
    with pytest.raises(UserError, match="liked goes with {liked} in prompt.templates"):
        Recommender(Experiment(config, workdir), "").score(["3"], ["1"], liked=[True])


CONFIG_FILE = """
from pathlib import Path

from recommenders.tiny_answers import config_of


def get_config(path):
    return config_of(Path(path), "any", alpha=0.0)
"""


def test_the_script_scores_candidates_and_lists_nothing(workdir, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    command = [str(LAUNCH / "recommend.py"), f"--config={tmp_path / 'config.py'}:{workdir}"]
    command += [f"--workdir={workdir}", "--untrained", "--item=3", "--item=5"]

    def run(*flags):
        return Script([*command, *flags], {}).completed()

    title = load(workdir / "data").catalogue.titles[5]
    scored = run("--candidate=1", "--candidate=2", "--candidate=8", f"--disliked={title}")
    assert scored.returncode == 0, scored.stderr
    recommender = Recommender(Experiment(config_of(workdir, "any", alpha=0.0), workdir), "")
    scores = recommender.score(["3", "5"], ["1", "2", "8"], liked=[True, False])
    expected = sorted(zip(scores, ["1", "2", "8"], strict=True), reverse=True)
    found = [line.split()[1:3] for line in scored.stdout.splitlines()]
    assert found == [[f"{score:.4f}", item] for score, item in expected]
    for flags, message in (
        ([], "lists none: give items to Recommender.score or launch/recommend.py --candidate"),
        (["--candidate=1", "--disliked=2"], "--disliked='2' names an item that no --item names"),
        (["--disliked=3"], "--disliked with --candidate"),
    ):
        refused = run(*flags)
        assert refused.returncode == 1
        assert message in refused.stderr
