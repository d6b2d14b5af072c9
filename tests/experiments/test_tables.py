"""The tables of a grid's page: what is compared, counted, missing, and what it cost."""

import dataclasses

import numpy as np
import pytest
from made_results import TEACHERS, cells, make_results

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.results import TEST, VALIDATION, Cell
from tca4rec_jax.experiments.setups import Results
from tca4rec_jax.experiments.tables import (
    aligned_against_plain,
    as_json,
    best_in_words,
    core_hours,
    cost_table,
    guided_against_teacher,
    in_words,
    model_table,
    most_seeds,
    question_table,
    recommenders_compared,
    told_apart,
)
from tca4rec_jax.reporting import markdown_table


@pytest.fixture(scope="module")
def aligned(results):
    return aligned_against_plain(results)


def without(results, gone):
    """The results without the lines of cells for which `gone` is true."""
    kept = {(cell, on): line for (cell, on), line in results.lines.items() if not gone(cell, on)}
    return Results(results.workdir, kept)


def test_every_aligned_setup_is_compared_with_its_own_plain_one(aligned):
    assert len(aligned.compared) == 9
    for setup, plain in aligned.compared.items():
        assert (plain.recommender, plain.steps) == (setup.recommender, setup.steps)
        assert (plain.alpha, plain.cf, setup.guidance) == (0.0, None, 0.0)
    assert aligned.missing == []
    assert aligned.better(NLL) == aligned.better("ndcg@10") == (6, 9)


def test_an_alpha_0_that_chose_steps_and_tau_of_its_own_is_the_baseline(tmp_path):
    """It is not where the axis was not chosen: then the right one is still missing."""
    run = {"softmax": "children", "guidance": 0.0, "seed": 0}
    plain = Cell("d", "ids", alpha=0.0, steps=250, tau=1.0, **run)
    of_cf = {"cf": "ease", "cf_seed": 0, "alpha": 0.5, "beta": 1.0, "form": "cross_entropy"}
    aligned = dataclasses.replace(plain, **of_cf, steps=1000, tau=2.0)
    two = [plain, aligned, Cell("d", "cf", "ease", 0)]
    make_results(tmp_path, [*two, dataclasses.replace(aligned, steps=250, tau=1.0)])
    both = Results.read(tmp_path)
    question = aligned_against_plain(without(both, lambda cell, _: cell not in two))
    assert question.missing == []
    (row,) = question_table(question, NLL, 1, ("alpha = 0", "aligned")).values()
    assert row["alpha"] == "0.5 against 0 of steps 250, tau 1"
    question = aligned_against_plain(both)
    assert question.missing == ["d, ids, ease: alpha = 0"]
    rows = question_table(question, NLL, 1, ("alpha = 0", "aligned"))
    assert rows["d, ids, ease"]["alpha"] == "0.5"


def test_every_guided_setup_is_compared_with_its_cf_model(results):
    question = guided_against_teacher(results)
    assert len(question.compared) == 6
    assert all(cf.cf == setup.cf for setup, cf in question.compared.items())
    assert {metric for _, metric in question.effects} == {"ndcg@10"}  # guided lists have no NLL
    assert question.better("ndcg@10") == (4, 6)


def test_the_table_says_what_is_missing(results):
    def gone(cell, on):
        lost = cell.recommender == "ids" and (cell.cf == "ease" or not cell.alpha)
        one_seed_less = cell.recommender == "titles" and cell.cf == "sasrec" and cell.seed == 2
        return on == TEST and (lost or one_seed_less)

    question = aligned_against_plain(without(results, gone))
    assert sorted(question.missing) == [
        "movielens, ids, ease: aligned",
        "movielens, ids, popularity: alpha = 0",
        "movielens, ids, sasrec: alpha = 0",
    ]
    assert question.better(NLL) == (4, 9)
    table = question_table(question, NLL, 3, ("alpha = 0", "aligned"))
    assert table["movielens, ids, ease: aligned"] == {"verdict": "missing"}
    row = table["movielens, titles, sasrec, steps 250"]
    assert (row["seeds"], row["alpha"], row["verdict"]) == ("2 of 3", "0.5", "better")
    assert "guidance" not in row
    assert "| missing |" in markdown_table(table)


def test_a_table_row_is_the_effect(aligned):
    table = question_table(aligned, NLL, 3, ("alpha = 0", "aligned"))
    setup = next(one for one in aligned.compared if (one.recommender, one.cf) == ("ids", "ease"))
    row, one = table["movielens, ids, ease"], aligned.effects[setup, NLL]
    assert (row["alpha = 0"], row["aligned"]) == (one.baseline, one.mean)
    assert (row["difference"], row["seeds"]) == (one.difference, 3)
    assert row["gain"] == f"{one.difference.mean / one.baseline:+.1%}"
    assert row["p by Holm"] == f"{one.p_holm:.4f}"


def test_setups_are_told_apart_by_what_differs_for_their_cf_model():
    one = Cell("d", "r", "ease", alpha=0.5, beta=0.1, steps=250, form="mixture")
    others = [one, dataclasses.replace(one, steps=500), dataclasses.replace(one, cf="x", beta=1.0)]
    assert in_words(one, others) == "d, r, ease, steps 250"
    assert told_apart(others[2], others) == ""
    assert told_apart(one, [one, dataclasses.replace(one, alpha=0.1)]) == "alpha 0.5"
    assert in_words(Cell("d", "popular")) == "d, most popular"
    assert in_words(Cell("d", "cf", "ease"), others) == "d, ease"


def test_all_models_stand_side_by_side(results):
    table = model_table(results, "movielens")
    assert [*table][:4] == ["most popular", *TEACHERS]
    assert len(table) == 4 + 3 + 9 + 6  # plain, aligned, guided
    row = table["ids, ease, alpha 0.5, guidance 1"]
    cell = next(c for c in results.setups(TEST, recommender="ids", cf="ease") if c.guidance)
    of_seeds = [line.metrics["ndcg@10"] for line in results.of_setup(cell, TEST)]
    assert row["NDCG@10, 95% interval"].mean == pytest.approx(np.mean(of_seeds))
    assert row["over seeds"] == f"± {np.std(of_seeds, ddof=1):.4f}"
    assert row["NLL"] is None
    assert table["most popular"]["over seeds"] is None


def test_models_of_other_rows_do_not_stand_side_by_side(tmp_path):
    popular, cf = Cell("d", "popular"), Cell("d", "cf", "ease", 0)
    make_results(tmp_path, [popular, cf], splits=(TEST,))
    results = Results.read(tmp_path)
    assert len(model_table(results, "d")) == 2
    ranks = results.ranks(cf, TEST)
    ranks._replace(position_R=ranks.position_R[::-1]).write(
        tmp_path / results.lines[cf, TEST].ranks
    )
    with pytest.raises(UserError, match="not ranked on the same test rows"):
        model_table(Results.read(tmp_path), "d")


def test_the_best_is_chosen_on_validation_rows_and_said_in_one_sentence(results):
    words = best_in_words(results, "movielens")
    assert words.startswith("On movielens the LLM that is best on the validation rows (ids, ease;")
    assert "alpha 0.5, guidance 1, 250 steps" in words
    assert all(f"than {name} (" in words for name in ("most popular", *TEACHERS))
    assert words.endswith(". 3 seeds.")
    moved = {
        (dataclasses.replace(cell, cf_seed=1) if cell.is_llm and cell.cf else cell, on): line
        for (cell, on), line in results.lines.items()
    }
    words = best_in_words(Results(results.workdir, moved), "movielens")
    assert words.count(" than ") == 1, "there is no CF model of its cf_seed"
    no_validation = without(results, lambda cell, on: on == VALIDATION)
    assert "best on these rows themselves" in best_in_words(no_validation, "movielens")
    no_llm = without(results, lambda cell, on: cell.is_llm)
    assert best_in_words(no_llm, "movielens") == ""
    assert most_seeds(no_llm) == 0


def test_recommenders_are_compared_at_the_same_alpha_cf_model_and_steps(results):
    question = recommenders_compared(results)
    assert len(question.compared) == 4
    for one, first in question.compared.items():
        assert (one.recommender, first.recommender) == ("ids", "titles")
        assert (first.alpha, first.cf, first.steps) == (one.alpha, one.cf, one.steps)
    truth = -0.1  # of NLL, by construction
    for (_, metric), effect in question.effects.items():
        if metric == NLL:
            assert effect.difference.low < truth < effect.difference.high
    table = question_table(question, NLL, 3, ("titles", "ids"))
    assert table["movielens, ids"]["alpha"] == "0"
    assert "guidance" not in table["movielens, ids"]


def test_recommenders_whose_alphas_were_chosen_apart_are_compared_at_their_own(results):
    lines = {}
    for (cell, on), line in results.lines.items():
        if (cell.recommender, cell.alpha) == ("ids", 0.5):
            cell = dataclasses.replace(cell, alpha=0.1)
        lines[cell, on] = line
    question = recommenders_compared(Results(results.workdir, lines))
    assert len(question.compared) == 4
    table = question_table(question, NLL, 3, ("titles", "ids"))
    assert table["movielens, ids, ease"]["alpha"] == "0.1 against 0.5"


def test_a_run_that_cells_share_costs_once(results):
    lines = [line for (cell, _), line in results.lines.items() if cell.recommender == "ids"]
    shared = [dataclasses.replace(lines[0], run="same", key=str(n)) for n in range(3)]
    assert core_hours(shared) == pytest.approx((2 * 250 + 3 * 2 * 60) / 3600)
    assert core_hours(lines[:1]) == pytest.approx(2 * (250 + 60) / 3600)
    table = cost_table(results)
    every = sum(row["core-hours"] for name, row in table.items() if name != "all")
    assert table["all"]["core-hours"] == pytest.approx(every, abs=0.05)
    assert table["movielens, cf"]["runs"] == 0
    assert table["all"]["cells"] == len(results.lines)


def test_json_says_what_was_compared(aligned):
    found = as_json(aligned)
    assert len(found["effects"]) == 18
    first = found["effects"][0]
    assert first["setup"]["alpha"] == 0.5
    assert first["compared with"]["alpha"] == 0.0
    assert first["verdict"] in ("better", "no difference shown")
    assert found["missing"] == []
    assert len(cells()) == 4 + 3 * (3 * 1 + 3 * 6 + 6 + 2)
