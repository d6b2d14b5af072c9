"""Curves over an axis, and where and when effects arise, on a made grid whose truth is known."""

import dataclasses
import json

import numpy as np
import pytest
from made_results import ALPHAS, BETAS, TEACHERS, make_results

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.slices import head_items
from tca4rec_jax.experiments.analyses import (
    decision_panels,
    slice_effects,
    speed_panels,
    speed_table,
    steps_to,
    training_curve,
    validation_curve,
)
from tca4rec_jax.experiments.curves import (
    PLAIN,
    agreement_panels,
    character_table,
    curves,
    fluency_panels,
    list_character,
    list_panels,
    metric_panels,
    split_of,
)
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import aligned_against_plain, aligned_on_validation


@pytest.fixture(scope="module")
def over_alpha(results):
    return curves(results, "alpha", VALIDATION)


@pytest.fixture(scope="module")
def aligned(results):
    return aligned_against_plain(results)


def test_an_axis_is_drawn_on_the_split_that_has_more_of_it(results):
    assert split_of(results, "alpha") == VALIDATION
    only_test = Results(results.workdir, {k: v for k, v in results.lines.items() if k[1] == TEST})
    assert split_of(only_test, "alpha") == TEST


def test_a_curve_over_alpha_begins_with_the_plain_model(over_alpha):
    assert len(over_alpha) == 9
    for curve in over_alpha:
        assert [*curve.setups] == [0.0, *ALPHAS]
        assert {*curve.baselines.values()} == {curve.setups[0.0]}
        assert curve.setups[0.0].cf is None
    assert {curve.style for curve in over_alpha} == {"steps 250", "steps 1000", ""}
    assert {curve.color for curve in over_alpha} == {*TEACHERS}


def test_curves_over_beta_and_guidance(results):
    (beta,) = curves(results, "beta", VALIDATION)
    assert [*beta.setups] == sorted([1.0, *BETAS])
    assert [one.alpha for one in beta.baselines.values()] == [0.0] * 3
    guidance = curves(results, "guidance", VALIDATION)
    assert len(guidance) == 6
    for curve in guidance:
        assert [*curve.setups] == [0.0, 1.0]
        assert {*curve.baselines.values()} == {curve.setups[0.0]}
        assert curve.setups[0.0].alpha == 0.5
    assert curves(results, "tau", VALIDATION) == []


def test_over_tau_each_is_compared_with_the_plain_model_of_its_own_tau(tmp_path):
    plain = Cell("d", "ids", alpha=0.0, guidance=0.0, steps=1, softmax="children", seed=0)
    aligned = dataclasses.replace(plain, alpha=0.5, cf="ease", form="cross_entropy", beta=1.0)
    taus = (0.5, 2.0)
    made = [dataclasses.replace(one, tau=tau) for one in (plain, aligned) for tau in taus]
    make_results(tmp_path, made, gain=lambda cell: cell.tau * (1 + (cell.alpha or 0)))
    results = Results.read(tmp_path)
    (over_tau,) = curves(results, "tau", VALIDATION)
    assert [one.tau for one in over_tau.baselines.values()] == [*taus]
    panels = metric_panels(results, [over_tau], VALIDATION)["NLL of the title"]
    level, line = panels["d, ids"]
    assert (level.color, level.x, line.x) == (PLAIN, [*taus], [*taus])
    for tau, y in zip(level.x, level.y, strict=True):
        (own,) = results.of_setup(over_tau.baselines[tau], VALIDATION)
        assert (own.cell.tau, own.metrics[NLL]) == (tau, y)


def test_points_are_means_over_seeds_and_bands_differences_from_the_plain_model(
    results, over_alpha
):
    panels = metric_panels(results, over_alpha, VALIDATION)
    assert [*panels] == ["NDCG@10", "NLL of the title"]
    (line,) = (one for one in panels["NLL of the title"]["movielens, ids"] if one.color == "sasrec")
    assert line.x == [0.0, *ALPHAS]
    curve = next(
        one for one in over_alpha if (one.panel, one.color) == ("movielens, ids", "sasrec")
    )
    for x, y in zip(line.x, line.y, strict=True):
        seeds = results.of_setup(curve.setups[x], VALIDATION)
        assert y == pytest.approx(np.mean([of.metrics[NLL] for of in seeds]))
    assert line.low[0] == line.high[0] == line.y[0]
    assert line.high[-1] < line.y[0]  # a clear gain
    beta = metric_panels(results, curves(results, "beta", VALIDATION), VALIDATION)
    assert [one.color for one in beta["NDCG@10"]["movielens, titles"]] == [PLAIN, "sasrec"]


def test_panels_of_lines_are_means_of_what_lines_hold(results, over_alpha):
    near = agreement_panels(results, over_alpha, VALIDATION)["Kendall tau"]["movielens, ids"]
    line = next(one for one in near if one.color == "ease")
    assert line.y == pytest.approx([0.1 + 0.2 * (0.9 + alpha) for alpha in (0.0, *ALPHAS)])
    texts = fluency_panels(results, over_alpha, VALIDATION)["share of valid titles"]
    assert texts["movielens, ids"][0].y == pytest.approx(
        [0.8 - 0.3 * alpha for alpha in (0.0, *ALPHAS)]
    )
    guided = curves(results, "guidance", VALIDATION)
    assert fluency_panels(results, guided, VALIDATION) == {}  # one point is no line
    lists = list_panels(results, over_alpha, VALIDATION)
    assert [*lists] == ["share of items listed", "popularity, relative to targets"]


def test_what_lists_are_like_is_counted(results):
    line = next(iter(results.lines.values()))
    items = results.ranks(line.cell, line.split).items_RxM
    facts = results.facts(line.cell, line.split)
    found = list_character(results, line)
    assert found["coverage"] == len({*items.ravel().tolist()} - {-1}) / len(facts.count_I)
    listed = [facts.count_I[item] for row in items for item in row if item >= 0]
    expected = np.mean(listed) / np.mean([facts.count_I[item] for item in facts.target_R])
    assert found["popularity"] == pytest.approx(expected)


def test_slices_hold_the_rows_that_they_name(results, aligned):
    found = slice_effects(results, aligned, NLL)
    assert [*found][:3] == ["head items", "tail items", "history 0 to 4"]
    setup = next(one for one in aligned.compared if (one.recommender, one.cf) == ("ids", "ease"))
    facts = results.facts(results.cells(setup, TEST)[0], TEST)
    ours, theirs = results.paired(setup, aligned.compared[setup], TEST, NLL)
    head = head_items(facts.count_I)[facts.target_R]
    inside = {"head items": head, "tail items": ~head, "history 50 or more": facts.history_R >= 50}
    for name, rows in inside.items():
        expected = np.mean(
            [ours[s, r] - theirs[s, r] for s in range(3) for r in np.flatnonzero(rows)]
        )
        assert found[name][setup].difference.mean == pytest.approx(expected)
    assert len(found["head items"]) == 9
    every = facts._replace(history_R=np.full_like(facts.history_R, 12))  # all of one length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "facts", lambda *_: every)
        assert [*slice_effects(results, aligned, NLL)] == ["head items", "tail items"]


def test_decisions_gain_what_they_were_made_to(results, aligned):
    panels = decision_panels(results, aligned)["gain in nats"]
    line = next(one for one in panels["movielens, ids"] if one.color == "ease")
    assert line.x == [1, 2, 3]  # the fourth is of 9 rows
    assert line.y == pytest.approx([0.45, 0.1, 0.0])


def test_training_is_faster_by_what_was_made(results, aligned):
    lines = speed_panels(results, aligned)["NLL, validation"]["movielens, titles"]
    assert [(line.color, line.style) for line in lines[:2]] == [
        (PLAIN, "steps 250"),
        (PLAIN, "steps 1000"),
    ]
    assert len(lines) == 8
    row = speed_table(results, aligned)["movielens, ids, ease"]
    setup = next(one for one in aligned.compared if (one.recommender, one.cf) == ("ids", "ease"))
    _, steps, nll_SxN = validation_curve(results, setup)
    assert steps == [50, 100, 150, 200, 250]
    goal = row["NLL, validation, at the end, alpha = 0"]
    reached = float(row["steps to its NLL, aligned"])
    assert np.interp(reached, steps, nll_SxN.mean(axis=0)) == pytest.approx(goal, abs=0.01)
    assert row["share of the steps"] == f"{reached / 250:.0%}"


@pytest.mark.parametrize(
    ("nll", "reached"), [([5, 3, 2], 15), ([5, 4, 4], 20), ([3, 9, 9], 10), ([9, 8, 7], None)]
)
def test_steps_to_a_likelihood(nll, reached):
    assert steps_to([10.0, 20.0, 30.0], np.array(nll, float), 4.0) == reached


def test_runs_without_validations_have_curves_of_their_batches_and_no_speed(
    results, aligned, tmp_path
):
    bare = {k: dataclasses.replace(line, validations={}) for k, line in results.lines.items()}
    assert speed_panels(Results(results.workdir, bare), aligned) == {}
    without = Results(tmp_path, bare)
    setup, plain = next(iter(aligned.compared.items()))
    for number, line in enumerate((*without.of_setup(setup, TEST), *without.of_setup(plain, TEST))):
        (tmp_path / line.run).mkdir(parents=True)
        log = [{"step": step, "nll_per_title": number + 9 - step / 5} for step in range(23)]
        log.append({"step": 23, "validation/seconds": 1.0})
        text = "".join(json.dumps(one) + "\n" for one in log)
        (tmp_path / line.run / "log.jsonl").write_text(text)
    _, steps, nll_SxN = training_curve(without, setup)
    assert steps == [3, 6, 9, 11, 13, 15, 17, 19, 21, 23]
    assert nll_SxN[:, 0] == pytest.approx([8.8, 9.8, 10.8])
    assert nll_SxN[0, -1] == pytest.approx(9 - 21.5 / 5)
    assert [*speed_panels(without, aligned)] == ["NLL, training"]
    assert speed_table(without, aligned) == {}


def test_a_grid_of_validation_rows_alone_has_the_speed_of_its_runs(results, aligned):
    lines = {of: line for of, line in results.lines.items() if of[1] == VALIDATION}
    alone = Results(results.workdir, lines)
    found = speed_table(alone, aligned_on_validation(alone))["movielens, ids, ease, alpha 0.5"]
    assert found == speed_table(results, aligned)["movielens, ids, ease"]


def test_what_lists_and_texts_are_like_stands_beside_the_plain_model(results, aligned):
    row = character_table(results, aligned)["movielens, ids, ease"]
    assert row["Kendall tau"] == "0.28 → 0.38"
    assert row["share of valid titles"] == "0.8 → 0.65"
    assert {"share of items listed", "popularity, relative to targets"} < {*row}


def test_aligned_models_of_several_alphas_are_told_apart(tmp_path):
    plain = Cell("d", "ids", alpha=0.0, guidance=0.0, steps=10, softmax="children", seed=0)
    aligned = dataclasses.replace(plain, cf="ease", form="cross_entropy", beta=1.0)
    make_results(
        tmp_path,
        [plain, *(dataclasses.replace(aligned, alpha=alpha) for alpha in (0.1, 0.5))],
        splits=("validation",),
    )
    lines = {(cell, TEST): line for (cell, _), line in Results.read(tmp_path).lines.items()}
    results = Results(tmp_path, lines)
    question = aligned_against_plain(results)
    drawn = speed_panels(results, question)["NLL, validation"]["d, ids"]
    found = [(one.color, one.style) for one in drawn]
    assert found == [(PLAIN, ""), ("ease", "alpha 0.1"), ("ease", "alpha 0.5")]


def test_facts_of_other_rows_are_refused(tmp_path):
    make_results(tmp_path, [Cell("d", "popular")], splits=(TEST,))
    path = tmp_path / "rows" / f"d-{TEST}.npz"
    saved = dict(np.load(path))
    np.savez(path, **saved | {"position_R": saved["position_R"] + 1})
    with pytest.raises(UserError, match="d-test.npz is of other rows than .*'d popular'"):
        Results.read(tmp_path).facts(Cell("d", "popular"), TEST)
