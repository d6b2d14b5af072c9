"""Every kind of recommender in kinds.py is trained, stopped, evaluated, asked and exported."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recommenders import brute_force
from recommenders.kinds import KINDS, experiment_of, first_batches, make_workdir_of
from tiny_workdir import ITEMS, make_workdir, stopped_and_gone_on

from tca4rec_jax.config import build
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.explanation.explainer import Explainer
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.recommenders.vectors import describe_vectors
from tca4rec_jax.train import load_batches, train

HISTORIES = [["0", "3", "7"], ["5", "2"]]
EXPLAINED = ("titles", "bigrec", "llara", "from scratch, ids", "ids, new rows")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_workdir(path)
    return path


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tiny, tmp_path_factory):
    """(kind, its experiment, the last state) of a kind with a trained run `whole`."""
    workdir = tmp_path_factory.mktemp("kind") / "workdir"
    make_workdir_of(request.param, tiny, workdir)
    experiment = experiment_of(request.param, workdir, "whole")
    return request.param, experiment, train(experiment)


@pytest.fixture(scope="module")
def first_batch(trained):
    """(its experiment, batches, number) of a kind's first batch, its logits, and the jitted loss
    of an objective, which compiles for all of them once."""
    kind, whole, _ = trained
    experiment = experiment_of(kind, whole.workdir, "fresh")
    batches = load_batches(experiment)  # with CF logits, which must not matter at alpha = 0
    graph, state, base = experiment.initial_state()
    (number,), decoder = first_batches(batches, 1), nnx.merge(graph, state.params, base)
    batch, cf = batches(number), experiment.cf_arrays(batches.cf_items)
    if batch.soft is not None:
        assert (batch.soft.position_BxL < batch.tokens_BxS.shape[1]).any()
    loss = partial(nnx.jit(experiment.recipe.loss), decoder, batch, *cf)
    return (experiment, batches, number), nnx.jit(logits)(decoder, batch), loss


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_loss_is_that_of_brute_force(first_batch, alpha):
    """alpha = 0 is the plain loss; alpha > 0 has the soft labels of a dictionary of prefixes."""
    (experiment, *of_batch), logits_BxSxV, loss = first_batch
    experiment.config.objective.alpha = alpha
    objective = jax.tree.map(jnp.float32, build(Objective, experiment.config.objective))
    found = loss(objective)
    total, count = brute_force.loss(experiment, *of_batch, logits_BxSxV)
    np.testing.assert_allclose(found.total, total, rtol=2e-5)
    assert float(found.positions) == count


def logits(decoder, batch):
    hidden_BxSxD = decoder.hidden(batch.tokens_BxS, batch.length_B, soft=batch.soft)
    return jax.vmap(decoder.head(None))(hidden_BxSxD)


def listing(trained):
    """(kind, its experiment) of one that lists items."""
    kind, whole, _ = trained
    if not KINDS[kind].lists:
        pytest.skip("it lists nothing")
    return kind, whole


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_equal(trained, monkeypatch):
    kind, whole, expected = trained
    config = experiment_of(kind, whole.workdir, "stopped").config
    _, state = stopped_and_gone_on(config, whole.workdir, monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_lists_are_evaluated_with_and_without_guidance(trained):
    kind, whole, _ = trained
    variants = (("trained", "whole", 0.0), ("guided", "whole", 1.0))
    experiment = experiment_of(kind, whole.workdir, "whole", evaluation__variants=variants)
    evaluate_run(experiment.config, whole.workdir)
    models = json.loads((whole.workdir / "results.json").read_text())["models"]
    assert {label for label, *_ in variants} <= models.keys()


@pytest.mark.slow
def test_candidates_are_scored_as_they_are_in_a_guided_list(trained):
    """Beams that hold every item: no candidate is dropped."""
    kind, whole = listing(trained)
    changes = {"decoding__beams": ITEMS, "decoding__exclude_history": False}
    changes |= {"decoding__rules": "exact", "decoding__length_penalty": 0.0}
    experiment = experiment_of(kind, whole.workdir, "whole", **changes)
    recommender = Recommender(experiment, "whole", guidance=1.0)
    found = recommender.recommend(HISTORIES[0], k=ITEMS)
    assert len({one.item_id for one in found}) == ITEMS
    scores = recommender.score(HISTORIES[0], [one.item_id for one in found])
    np.testing.assert_allclose(scores, [one.score for one in found], atol=1e-4)


@pytest.mark.slow
def test_an_explanation_has_the_scores_of_the_list(trained):
    kind, whole = listing(trained)
    if kind == "bigrec, grounded":
        with pytest.raises(UserError, match="grounding"):
            Explainer(Recommender(whole, "whole"))
    if kind not in EXPLAINED:
        pytest.skip("it has the search of one that is explained")
    recommender = Recommender(whole, "whole", guidance=1.0)
    found = recommender.recommend(HISTORIES[0], k=3)
    explanation = Explainer(recommender).explain(HISTORIES[0], 3)
    assert [one.item_id for one in explanation.items] == [one.item_id for one in found]
    scores = ([one.score for one in items] for items in (explanation.items, found))
    np.testing.assert_allclose(*scores, atol=1e-5, rtol=1e-6)
    for branch in explanation.branches:
        every = np.array([*(child.shares for child in branch.children), branch.rest])
        np.testing.assert_allclose(every.sum(axis=0) + branch.outside, 1.0, atol=1e-6)
    assert all(len(item.effects) == 3 for item in explanation.history)


@pytest.mark.slow
def test_an_export_opened_again_gives_the_same_lists(trained, tmp_path):
    kind, whole = listing(trained)
    export_decoder(
        tmp_path / "merged",
        whole.trained_decoder("whole"),
        whole.tokenizer,
        kind="merged",
        dtype="float32",
        base_model="",
        vectors=describe_vectors(whole),
    )
    changes = {"llm__weights": str(tmp_path / "merged")}
    if whole.item_vectors is not None:
        changes["projector__weights"] = str(tmp_path / "merged" / "projector.safetensors")
    opened = experiment_of(kind, whole.workdir, "opened", **changes)
    expected = Recommender(whole, "whole").recommend(HISTORIES, k=3)
    found = Recommender(opened, "").recommend(HISTORIES, k=3)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.item_id for one in ours] == [one.item_id for one in theirs]
        scores = ([one.score for one in items] for items in (ours, theirs))
        np.testing.assert_allclose(*scores, atol=1e-4)
