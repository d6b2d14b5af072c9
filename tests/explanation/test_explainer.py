"""Explanations against the recommender, brute force over items, and the training objective."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from decoding import oracle
from tiny_workdir import ITEMS, make_config, make_workdir

from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.core.collaborative_tokenizer import DENSE, cf_logits
from tca4rec_jax.core.decisions import Targets, title_decisions
from tca4rec_jax.core.losses import of_logits, tca_loss
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie
from tca4rec_jax.data.dataset import load
from tca4rec_jax.decoding.engine import read_titles_batch
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.decoding.search_programs import search_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.explanation.explainer import Explainer, _cf_log_probs
from tca4rec_jax.explanation.explanation import Branch, Child, Explanation, Settings, Shares
from tca4rec_jax.explanation.page import explanation_page
from tca4rec_jax.explanation.terminal import explanation_lines
from tca4rec_jax.explanation.tree import mixed

# Prefix titles, one title of two items, long shared stretches, early and late decisions.
TITLES = [
    *("ab", "abc", "defghi", "abc", "defghb", "defghiaa", "i", "bbbbb", "ca", "defghiacc"),
    *("jkl", "jkmb"),
]
HISTORY = ["0", "8", "10"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """With a CF model that reads histories."""
    path = tmp_path_factory.mktemp("explained")
    make_workdir(path, TITLES)
    config = make_config(path, "")
    config.cf.model = "ease"
    run_cf(config.cf, load(path / "data"), path, history_length=4)
    return path


def recommender_of(workdir, guidance=0.7, tensor=1, **decoding):
    config = make_config(workdir, "")
    config.mesh.tensor = tensor
    config.cf.model = "ease"
    config.objective.alpha = 0.3
    config.decoding.update(
        {"exclude_history": False, "beams": ITEMS, "temperature": 1.3} | decoding
    )
    config.decoding.beta = 0.5
    return Recommender(Experiment(config, workdir), "", guidance=guidance)


MASKS = ["before_softmax", "after_softmax"]


@pytest.fixture(scope="module", params=MASKS)
def whole(request, workdir):
    """(the recommender, its explanation) of a list of the whole catalogue, nothing left out."""
    recommender = recommender_of(workdir, mask=request.param, length_penalty=0.5)
    explainer = Explainer(recommender)
    compare = [("abc", "defghi"), ("2", "9"), ("1", "3")]
    return recommender, explainer.explain(HISTORY, ITEMS, children=ITEMS, compare=compare)


def check_sums(explanation):
    for branch in explanation.branches:
        every = np.array([*(child.shares for child in branch.children), branch.rest])
        np.testing.assert_allclose(every.sum(axis=0) + branch.outside, 1.0, atol=1e-6)
        assert branch.outside.guided == 0.0
        assert (every >= 0).all()


def check_scores(explanation, recommender, history=HISTORY):
    """Of the list: path products, as of the steps, are the recommender's scores."""
    listed = recommender.recommend(history, len(explanation.listed))
    assert [one.item_id for one in listed] == [one.item_id for one in explanation.listed]
    settings = explanation.settings
    for ours, theirs in zip(explanation.listed, listed, strict=True):
        product = sum(step.llm + step.forced + settings.guidance * step.cf for step in ours.steps)
        assert product / ours.tokens**settings.length_penalty == pytest.approx(ours.score)
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        for step in ours.steps:
            shares = explanation.branches[step.branch].children[step.child].shares
            np.testing.assert_allclose(np.log(shares[:2]), (step.llm, step.cf), atol=1e-6)


def test_where_items_are_split_over_devices_the_scores_are_those_of_the_list(workdir):
    recommender = recommender_of(workdir, tensor=2)
    explanation = Explainer(recommender).explain(HISTORY, 5)
    check_sums(explanation)
    check_scores(explanation, recommender)


def below(explanation, number, allowed=range(ITEMS)):
    """{child number: items} of a branch, by the letters of titles."""
    branch, end = explanation.branches[number], "z"
    texts = [f" {title}{end}" for title in TITLES]
    prefixes = [branch.prefix + (child.text or end) for child in branch.children]
    return [[i for i in allowed if texts[i].startswith(prefix)] for prefix in prefixes]


def cf_logits_of(recommender, history):
    items = np.array([recommender.find(history, "history")])
    model, latest = recommender.cf_model, items[:, -recommender.cf_model.history_length :]
    padded = np.pad(
        latest, ((0, 0), (model.history_length - latest.shape[1], 0)), constant_values=-1
    )
    return np.asarray(cf_logits(model.vectors(padded.astype(np.int32)), model.items), np.float64)[0]


def test_children_sum_to_one_and_paths_are_scores(whole):
    recommender, explanation = whole
    check_sums(explanation)
    check_scores(explanation, recommender)
    outside = [branch.outside.llm for branch in explanation.branches]
    assert (max(outside) > 0.1) == (explanation.settings.mask == "after_softmax")


def test_scores_and_shares_are_those_of_brute_force(whole):
    """Of all titles; and of the LLM, the CF model, their mix and product at every branch."""
    recommender, explanation = whole
    experiment, weights = recommender.experiment, recommender.weights_of(None)
    prompt = experiment.prompts(np.array([recommender.find(HISTORY, "history")])).tokens[0].tolist()
    written = [experiment.items.written[item].tolist() for item in range(ITEMS)]
    logits_I = cf_logits_of(recommender, HISTORY)
    mask = explanation.settings.mask
    expected = oracle.exhaustive_scores(
        recommender.decoder, prompt, written, mask, weights, logits_I
    )
    for one in explanation.items:
        score = expected[tuple(written[int(one.item_id)])]
        assert one.score == pytest.approx(score, abs=1e-4)
    p_cf_I = np.exp(logits_I / 0.5)
    for number, branch in enumerate(explanation.branches):
        mass = np.array([p_cf_I[items].sum() for items in below(explanation, number)])
        found = np.array([child.shares for child in branch.children])
        llm, cf, mix, guided = found.T
        np.testing.assert_allclose(cf, mass / mass.sum(), atol=1e-6)
        np.testing.assert_allclose(mix, 0.7 * llm + 0.3 * cf, atol=1e-12)
        product = llm * cf**0.7
        np.testing.assert_allclose(guided, product / product.sum(), atol=1e-9)
        assert [child.items for child in branch.children] == [
            len(items) for items in below(explanation, number)
        ]


def test_the_mixture_is_the_soft_label_of_training(workdir):
    """The objective's loss, of the explanation's numbers alone."""
    recommender = recommender_of(workdir, temperature=1.0)
    explainer = Explainer(recommender)
    explanation = explainer.explain(HISTORY, ITEMS, children=ITEMS, leave_one_out=False)
    experiment, trie = recommender.experiment, recommender.experiment.compressed_trie
    objective = Objective(alpha=0.3, beta=0.5, form="cross_entropy", softmax="children")
    history = np.array([recommender.find(HISTORY, "history")])
    prompt = experiment.prompts(history).tokens[0]
    logits_1xI = jnp.asarray(cf_logits_of(recommender, HISTORY)[None, :], jnp.float32)
    for one in explanation.items[::4]:
        item = int(one.item_id)
        label = experiment.items.written[item]
        text = np.concatenate([prompt, label])[None, :]
        logits_1xSxV = oracle._full_logits(recommender.decoder, text, np.array([text.size]))
        targets = Targets.of_titles(
            label[None, :], np.ones((1, len(label)), np.float32),
            title_decisions(trie).pad(np.array([item])),
        )  # fmt: skip
        states = logits_1xSxV[:, len(prompt) - 1 : -1]
        args = targets, logits_1xI[:, None], DENSE, DeviceTrie.of(trie), objective
        total = 0.0
        for step in one.steps:
            children = explanation.branches[step.branch].children
            llm, cf, *_ = np.array([child.shares for child in children]).T
            onehot = np.arange(len(children)) == step.child
            total -= np.sum(mixed(onehot, cf, explanation.settings.alpha) * np.log(llm))
        assert total == pytest.approx(float(tca_loss(states, of_logits, *args).total), rel=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_what_is_left_out_has_no_share(workdir, mask):
    recommender = recommender_of(workdir, mask=mask, exclude_history=True)
    explanation = Explainer(recommender).explain(HISTORY, 5, children=9, leave_one_out=False)
    check_sums(explanation)
    check_scores(explanation, recommender)
    assert not {*HISTORY} & {one.item_id for one in explanation.items}
    root = explanation.branches[1]  # after the space that every title begins with
    assert "ca" not in [child.text.strip() for child in root.children]
    assert sum(child.items for child in root.children) + root.rest_items == ITEMS - len(HISTORY)
    assert (root.outside.llm > 0.05) == (mask == "after_softmax")


def test_effects_are_differences_of_scores(whole):
    recommender, explanation = whole
    names = [one.item_id for one in explanation.items]
    score = recommender.score(HISTORY, names)
    for place, item in enumerate(explanation.history):
        without = recommender.score(HISTORY[:place] + HISTORY[place + 1 :], names)
        np.testing.assert_allclose(item.effects, score - without, atol=1e-4)
        assert np.abs(item.effects).max() > 1e-3


def test_comparisons_add_up_to_the_difference(whole):
    _, explanation = whole
    early, late, same = explanation.comparisons
    items = explanation.items
    for one in explanation.comparisons:
        difference = items[one.first].score - items[one.second].score
        assert one.difference == pytest.approx(difference, abs=1e-9)
    assert explanation.branches[early.branch].prefix == " "
    assert explanation.branches[late.branch].prefix == late.prefix == " defghi"
    assert max(map(abs, late.before)) > 1e-3  # titles of different lengths, of a penalty
    assert (same.branch, same.prefix, same.difference) == (None, "abc", 0.0)


def test_guidance_moves_places(workdir):
    explainer = Explainer(recommender_of(workdir, 0.0))
    plain = explainer.explain(HISTORY, 4)
    guided = explainer.explain(HISTORY, 4, guidance=3.0)
    assert plain.without == ()
    assert [str(one.cf) for one in plain.items] == ["0.0"] * 4  # not -0.0
    assert guided.without == tuple((one.item_id, one.title) for one in plain.items)
    places = {one.item_id: one.place for one in plain.items}
    assert [one.place_without for one in guided.items] == [
        places.get(one.item_id) for one in guided.items
    ]
    assert [one.item_id for one in guided.items] != [one.item_id for one in plain.items]


def test_another_history_compiles_nothing_new(workdir):
    """Of as many titles; whatever they are, the guidance and the filter."""
    recommender = recommender_of(workdir)
    explainer = Explainer(recommender)
    programs = (search_batch, read_titles_batch, _cf_log_probs)
    explainer.explain(["1", "2", "3"], 4)
    before = [one._cache_size() for one in programs]
    explainer.explain(["4", "8", "2"], 4, guidance=0.4)
    explainer.explain(["8", "11", "6"], 3, guidance=5.0)
    explainer.explain(["4", "8", "2"], 4, filter=recommender.filter(deny=["0"]))
    listed = [one.item_id for one in explainer.explain(["0", "9", "6"], 4).items]
    explainer.explain(["0", "9", "6"], 4, compare=[listed[:2]], children=1)
    assert [one._cache_size() for one in programs] == before


def test_a_single_item_cannot_be_left_out(workdir):
    explanation = Explainer(recommender_of(workdir)).explain(["3"], 2)
    assert [item.effects for item in explanation.history] == [()]


def test_questions_without_answer_are_errors(workdir):
    explainer = Explainer(recommender_of(workdir, exclude_history=True))
    for arguments, message in [
        ({"history": []}, "the history is"),
        ({"history": HISTORY, "k": 0}, "k must be at least 1"),
        ({"history": HISTORY, "compare": [("1", "zz")]}, "the items to compare: 'zz' is no item"),
        ({"history": HISTORY, "compare": [("1", "8")]}, "'ca' may not be recommended here"),
    ]:
        with pytest.raises(UserError, match=message):
            explainer.explain(**arguments)
    with pytest.raises(UserError, match="grounding.*no path through the trie explains"):
        Explainer(recommender_of(workdir, find="grounding"))


NASTY = "</script><script>alert(1)</script><b>\x1b[2J" + 60 * "x"


def test_pages_and_terminals_show_titles_and_obey_none(whole):
    _, explanation = whole
    items = tuple(dataclasses.replace(one, title=NASTY) for one in explanation.items)
    history = tuple(dataclasses.replace(one, title=NASTY) for one in explanation.history)
    nasty = dataclasses.replace(explanation, items=items, history=history)
    page = explanation_page(nasty)
    assert page.count("<script") == page.count("</script>") == 2  # the data, and the page's own
    assert "<b>\\x1b" not in page
    assert "&lt;b&gt;\\x1b[2Jxxx" in page
    assert not re.search("(src|href|url|import|@font-face)\\W*[=(]", page)
    data = re.search('id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads(json.dumps(nasty.to_json(), allow_nan=False))
    lines = [*explanation_lines(nasty)]
    assert max(map(len, lines)) == 80
    assert "\x1b" not in "".join(lines)
    assert sum("others" in line or "[#" in line for line in lines) >= 10


def test_titles_deep_in_the_tree_can_be_read():
    """40 choices, one below the other; wider than the terminal, each has a few characters."""
    even = Shares(0.5, 0.5, 0.5, 0.5)
    branches = tuple(
        Branch("", (Child("title", even, 2, (), number + 1), Child("x" * 60, even, 1, (), None)),
               even, 0, 0, Shares(0.0, 0.0, 0.0, 0.0))
        for number in range(40)
    )  # fmt: skip
    last = dataclasses.replace(branches[-1], children=branches[-1].children[1:])
    settings = Settings(0.0, 0.5, 1.0, 1.0, 0.0, "before_softmax")
    explanation = Explanation(settings, (), (), (), (*branches[:-1], last), ())
    lines = [line for line in explanation_lines(explanation) if "50.0" in line]
    assert len(lines) == 2 * 39 + 1
    assert all("title" in line or re.search("x{7}…$", line) for line in lines)


def test_json_names_every_field(whole):
    plain = whole[1].to_json()
    assert {*plain} == {field.name for field in dataclasses.fields(whole[1])}
    assert {*plain["branches"][0]["children"][0]["shares"]} == {*Shares._fields}
