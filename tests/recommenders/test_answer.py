"""Recommenders that answer yes or no, with TALLRec's and with CoLLM's prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recommenders.tiny_answers import TEMPLATES, config_of, make_answers_workdir
from tiny_workdir import stopped_and_gone_on

from tca4rec_jax.config import build
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.data.prompts import Prompts
from tca4rec_jax.data.questions import YES, question_rows
from tca4rec_jax.data.templates import PromptTemplate
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.evaluate import evaluate_run, sweep_guidance
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.intervals import bootstrap_intervals
from tca4rec_jax.llm.checkpoints.export import export_decoder
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.metrics import answer_metrics
from tca4rec_jax.recommenders import RECOMMENDERS
from tca4rec_jax.recommenders.answer import ANSWER, Questions, calibrate
from tca4rec_jax.recommenders.vectors import describe_vectors, soft_rows
from tca4rec_jax.serving.model import Limits, ServedModel
from tca4rec_jax.train import load_batches, train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("answer")
    make_answers_workdir(path)
    return path


def prepared(workdir, kind, alpha, softmax):
    """(experiment, batches, the loss and the float64 logits of batch 0)."""
    experiment = Experiment(config_of(workdir, "fresh", kind, softmax=softmax), workdir)
    batches = load_batches(experiment)
    experiment.config.objective.alpha = alpha
    graph, state, base = experiment.initial_state()
    decoder, batch = nnx.merge(graph, state.params, base), batches(0)
    objective = jax.tree.map(jnp.float32, build(Objective, experiment.config.objective))
    items, trie = experiment.cf_arrays(batches.cf_items)
    loss = nnx.jit(experiment.recipe.loss)(decoder, batch, items, trie, objective)
    read = nnx.jit(lambda d, b: d.hidden(b.tokens_BxS, b.length_B, soft=b.soft))
    hidden = read(decoder, batch)
    return experiment, batches, loss, np.asarray(jax.vmap(decoder.head())(hidden), np.float64)


@pytest.mark.parametrize(
    ("kind", "alpha", "softmax"),
    [
        *(("tallrec", alpha, of) for of in ("children", "vocabulary") for alpha in (0.0, 0.4)),
        ("collm", 0.4, "children"),
    ],
)
def test_the_loss_is_that_of_two_answers(workdir, kind, alpha, softmax):
    """At alpha > 0 with the CF model's calibrated probability of yes."""
    experiment, batches, loss, logits = prepared(workdir, kind, alpha, softmax)
    answers = experiment.items.written.values
    questions = Questions(experiment.data.splits["train"], 12, experiment.config)
    store, held = experiment.cf_store("train"), experiment.cf_store("validation")
    validation = Questions(experiment.data.splits["validation"], 12, experiment.config)

    def scores(store, questions):
        rows = zip(questions.position_R, questions.asked.item_R, strict=True)
        items, bias = store.item_table, store.item_bias
        return np.array([
            store.read(np.array([p]))[0] @ items[i] + (0 if bias is None else bias[i])
            for p, i in rows
        ])  # fmt: skip

    slope, offset = calibrate(scores(held, validation), validation.asked.answer_R == YES)
    p_yes = 1 / (1 + np.exp(-(slope * scores(store, questions) + offset)))
    total = 0.0
    for place, row in enumerate(batches.rows(0).tolist()):
        answer, at = questions.asked.answer_R[row], batches.examples.position[row][0]
        z = logits[place, at]
        allowed = answers if softmax == "children" else np.arange(z.size)
        log_p = z - np.log(np.exp(z[allowed]).sum())
        soft = alpha * np.array([p_yes[row], 1 - p_yes[row]])
        soft[answer] += 1 - alpha
        total -= soft @ log_p[answers]
    np.testing.assert_allclose(loss.total, total, rtol=2e-5)
    assert loss.positions == len(batches.rows(0))


def test_there_is_room_for_the_placeholders_of_a_row(workdir):
    config = config_of(workdir, "room", "collm")
    config.prompt.templates = ("a{user}b{history}c{item}{vector}d{target}",)
    assert load_batches(Experiment(config, workdir))(0).soft.vector_BxLxC.shape[1] == 2


def test_the_calibration_is_the_best_of_all():
    rng = np.random.default_rng(0)
    scores = rng.normal(5, 3, 400)
    yes = rng.random(400) < 1 / (1 + np.exp(2 - 0.7 * scores))
    slope, offset = calibrate(scores, yes)

    def nll(slope, offset):
        x = slope * scores + offset
        return np.logaddexp(0, np.where(yes, -x, x)).sum()

    assert slope == pytest.approx(0.7, abs=0.2)
    best = nll(slope, offset)
    for change in (-0.05, 0.05):
        assert nll(slope + change, offset) > best
        assert nll(slope, offset + change) > best
    apart, _ = calibrate(np.arange(8.0), np.arange(8) > 3)
    assert 0 < apart < 10
    with pytest.raises(UserError, match="one answer only"):
        calibrate(scores, np.ones(400, bool))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_run_is_stopped_goes_on_and_is_evaluated(workdir, monkeypatch, kind):
    expected = train(Experiment(config_of(workdir, f"{kind}_whole", kind), workdir))
    config = config_of(workdir, kind, kind)
    _, state = stopped_and_gone_on(config, workdir, monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    config.evaluation.rows = 0
    config.evaluation.variants = (("alone", kind, 0.0), ("guided", kind, 1.0))
    config.evaluation.differences = (("guided", "alone"),)
    results = evaluate_run(config, workdir, name=kind)
    with monkeypatch.context() as patch:  # the answers are kept
        patch.setattr(Experiment, "inference_decoder", None)
        again = evaluate_run(config, workdir, name=kind)
    assert again["models"] == results["models"]
    assert json.loads((workdir / "results" / kind / "results.json").read_text())["models"]
    assert "rows: Yes or No</h1>" in (workdir / "results" / kind / "report.html").read_text()
    assert list(results["models"]) == ["Most popular", "CF model", "alone", "guided"]
    alone, guided = (results["models"][name]["all"]["auc"].mean for name in ("alone", "guided"))
    difference = results["differences"]["guided - alone"]["auc"].mean
    assert difference == pytest.approx(guided - alone)
    counts = results["part_rows"]
    assert counts["all"] == counts["warm"] + counts["cold"] == results["rows"]

    # The same from the examples that training would make of these rows.
    experiment = Experiment(config, workdir)
    questions = Questions(experiment.data.splits["test"], 12, config)
    store = experiment.cf_store("test", questions.position_R)
    scores, yes = [], questions.asked.answer_R == YES
    decoder = experiment.inference_decoder(kind)
    args = experiment.data.splits["test"], experiment.items, experiment.compressed_trie, config
    examples = experiment.recipe.build_examples(*args)
    prompts = Prompts(examples.tokens, examples.slots)
    users = {"cf": lambda b: store.read(questions.position_R[b]), "cf_items": store.cf_items}
    soft = soft_rows(experiment, prompts, **users)
    read = nnx.jit(lambda d, t, n, s: d.head()(d.hidden(t, n, soft=s)))
    for row in range(len(examples)):
        rows = np.array([row])
        tokens, length = examples.tokens.pad(rows, 32, 0), examples.tokens.lengths[rows]
        logits = read(decoder, tokens, length.astype(np.int32), soft and soft(rows, 32))
        z = np.asarray(logits, np.float64)[0, examples.position[row][0]]
        scores.append(z[experiment.items.written[0][0]] - z[experiment.items.written[1][0]])
    expected = answer_metrics(np.round(scores, 4), yes, questions.sequences.user)
    found = results["models"]["alone"]["all"]
    assert found["auc"].mean == pytest.approx(expected["auc"].mean, abs=0.01)
    assert found["uauc"].mean == pytest.approx(expected["uauc"].mean, abs=0.01)
    cf = experiment.recipe.teacher(experiment, "test", store).read(questions.position_R)[:, 0]
    guided = np.round(scores, 4) + cf
    expected = answer_metrics(guided, yes, questions.sequences.user)["auc"]
    assert results["models"]["guided"]["all"]["auc"].mean == pytest.approx(expected.mean, abs=0.01)


@pytest.mark.slow
def test_an_export_opened_again_gives_the_same_answers(workdir, tmp_path):
    """The merged LLM, and the projector beside it."""
    config = config_of(workdir, "exported", "collm")
    config.evaluation.update(rows=0, variants=(("answers", "exported", 0.0),))
    experiment = Experiment(config, workdir)
    train(experiment)
    expected = evaluate_run(config, workdir, name="exported")["models"]["answers"]
    export_decoder(
        tmp_path,
        experiment.trained_decoder("exported"),
        experiment.tokenizer,
        kind="merged",
        dtype="float32",
        base_model="",
        vectors=describe_vectors(experiment),
    )
    config.llm.weights = str(tmp_path)
    config.projector.weights = str(tmp_path / "projector.safetensors")
    config.evaluation.variants = (("answers", "", 0.0),)
    found = evaluate_run(config, workdir, name="opened")["models"]["answers"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-4)


@pytest.mark.slow
def test_a_projector_is_trained_after_the_adapters(workdir):
    """CoLLM's two stages: the text alone, then the projector behind adapters that are held."""
    config = config_of(workdir, "first", alpha=0.0)
    config.prompt.templates = ("a{history}c{item}d{target}",)
    first = train(Experiment(config, workdir))
    config = config_of(workdir, "second", "collm", alpha=0.0)
    config.training.start_from, config.lora.train = "first", False
    second = train(Experiment(config, workdir))
    held, now = (state.params["adapters"] for state in (first, second))
    jax.tree.map(np.testing.assert_array_equal, held, now)
    assert len(jax.tree.leaves(second.params)) > len(jax.tree.leaves(first.params))


def arrays_of(part):
    return [vars(one) for one in (part if isinstance(part, tuple) else [part])]


def test_few_rows_are_sampled_with_the_seed(workdir):
    def examples(seed, rows):
        config = config_of(workdir, "few", alpha=0.0)
        config.seed, config.training.rows = seed, rows
        return load_batches(Experiment(config, workdir)).examples

    whole, some, again, others = (examples(*args) for args in ((0, 0), (0, 16), (0, 16), (1, 16)))
    assert len(some) == 16 < len(whole)
    position = [one.cf_position.values for one in (whole, some, again, others)]
    drawn = np.sort(np.random.default_rng(0).permutation(len(whole))[:16])
    for name, part in vars(whole.take(drawn)).items():
        jax.tree.map(np.testing.assert_array_equal, arrays_of(getattr(some, name)), arrays_of(part))
    np.testing.assert_array_equal(position[1], position[2])
    assert {*position[1]} != {*position[3]}


@pytest.mark.parametrize("mask", ["before_softmax", "after_softmax"])
def test_scores_are_log_odds_of_answers_of_unequal_lengths(workdir, mask):
    """The NLL of the untrained LLM against sums over the tokens that training would supervise."""
    config = config_of(workdir, "odds", alpha=0.0)
    config.recommender.answers, config.decoding.mask = ("yes", "n"), mask
    config.evaluation.rows = 0
    found = evaluate_run(config, workdir, name=f"odds_{mask}")["models"]["untrained"]["nll"]
    experiment = Experiment(config, workdir)
    decoder, written = experiment.inference_decoder(""), experiment.items.written
    questions = Questions(experiment.data.splits["test"], 12, config)
    template, log_p_Rx2 = build(PromptTemplate, config.prompt), []
    for answer in (0, 1):
        answer_R = np.full(len(questions.asked.item_R), answer)
        asked = questions.asked._replace(answer_R=answer_R)
        rows = question_rows(experiment.items, asked, template, with_answers=True)
        tokens = rows.prompts.tokens
        tokens_RxS = tokens.pad(np.arange(len(tokens)), 32, 0)
        hidden = nnx.jit(Decoder.hidden)(decoder, tokens_RxS, tokens.lengths.astype(np.int32))
        z_RxSxV = np.asarray(jax.vmap(decoder.head())(hidden), np.float64)
        if mask == "before_softmax":  # the first token decides
            z_RxSxV = z_RxSxV[:, :, [written[0][0], written[1][0]]]
        log_p_RxSxV = z_RxSxV - np.log(np.exp(z_RxSxV).sum(-1, keepdims=True))
        labels = [answer] if mask == "before_softmax" else written[answer].tolist()
        at = rows.starts.values - 1
        each = [log_p_RxSxV[np.arange(len(at)), at + n, v] for n, v in enumerate(labels)]
        log_p_Rx2.append(sum(each))
    difference_R = np.where(questions.asked.answer_R == YES, 1, -1) * (log_p_Rx2[0] - log_p_Rx2[1])
    nll_R, user_R = np.logaddexp(0, -difference_R), questions.sequences.user
    expected = bootstrap_intervals({"nll": nll_R}, user_R)["nll"]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length_penalty", 1.0),
        ("find", "grounding"),
        ("rules", "huggingface"),
        ("max_title_tokens", 4),
    ],
)
def test_a_search_whose_scores_are_no_probabilities_is_refused(workdir, monkeypatch, field, value):
    config = config_of(workdir, "refused", alpha=0.0)
    config.recommender.answers, config.decoding[field] = ("yes", "n"), value
    monkeypatch.setattr(Experiment, "inference_decoder", None)
    with pytest.raises(UserError, match=rf"set decoding.{field}="):
        evaluate_run(config, workdir, name="refused")


def test_another_name_answers_alike(workdir, monkeypatch):
    """What is done with a recommender follows from its recipe, not from its name."""
    monkeypatch.setitem(RECOMMENDERS, "another", ANSWER)
    config = config_of(workdir, "another")
    answer, config.recommender.name = Experiment(config_of(workdir, "another"), workdir), "another"
    results = evaluate_run(config, workdir, name="another")
    assert "auc" in results["models"]["untrained"]["all"]
    inputs, expected = Experiment(config, workdir).training_inputs, answer.training_inputs
    assert inputs == expected | {"recommender.name": "another"}
    assert "CF logits of validation" in inputs
    with pytest.raises(UserError, match=r"'another', which ranks nothing"):
        sweep_guidance(config, workdir, "", [1.0])


def test_what_does_not_go_together_is_refused(workdir):
    config = config_of(workdir, "refused", alpha=0.0)
    config.training.targets = "all"
    with pytest.raises(UserError, match=r"set training.targets=last"):
        load_batches(Experiment(config, workdir))
    config = config_of(workdir, "refused", alpha=0.0)
    config.recommender.name = "generative"
    with pytest.raises(UserError, match=r"set recommender.name=answer"):
        _ = Experiment(config, workdir).items
    experiment = Experiment(config_of(workdir, "refused", alpha=0.0), workdir)
    with pytest.raises(UserError, match=r"lists none: give items to Recommender.score"):
        Recommender(experiment, "").recommend(["0", "1"])
    with pytest.raises(UserError, match=r"'answer', which has no lists to serve: launch/eval"):
        ServedModel(experiment, "", Limits())
    with pytest.raises(UserError, match=r"ranks nothing: launch/evaluate.py --guidance=0,1"):
        sweep_guidance(experiment.config, workdir, "", [1.0])
