"""Effects over seeds and rows: against loops, with known truth, and what is refused."""

import dataclasses

import numpy as np
import pytest
from made_results import cells, gain, make_results

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.experiments.effects import Effect, effects, standardised
from tca4rec_jax.experiments.results import Cell
from tca4rec_jax.experiments.setups import Results, setup_of
from tca4rec_jax.intervals import Interval, holm

METRICS = "ndcg@10", NLL


def aligned(results, split="test", **fields):
    return results.setups(split, alpha=0.5, guidance=0.0, beta=1.0, **fields)


def against_plain(results, split="test"):
    return {one: (one, results.plain(one, split)) for one in aligned(results, split)}


def test_the_known_effects_are_found(results):
    """Of the two strong CF models, in both metrics; that of the weak one is too small."""
    compared = against_plain(results)
    found = effects(results, compared, "test", METRICS)
    assert len(found) == 2 * len(compared) == 2 * 9
    for (setup, metric), one in found.items():
        assert one.seeds == 3
        assert one.is_better == (None if setup.cf == "popularity" else True), (setup, metric)
        if metric == NLL:
            truth = gain(dataclasses.replace(setup, cf=None, alpha=0.0)) - gain(setup)
            assert one.difference.low < truth < one.difference.high
    worse = {one: (results.plain(one, "test"), one) for one in aligned(results, cf="ease")}
    verdicts = {one.verdict for one in effects(results, worse, "test", METRICS).values()}
    assert verdicts == {"worse"}


def test_effects_are_what_loops_over_seeds_and_rows_give(results):
    setup = aligned(results, cf="sasrec", recommender="ids")[0]
    plain = results.plain(setup, "test")
    one = effects(results, {"": (setup, plain)}, "test", ["ndcg@10"])["", "ndcg@10"]
    seeds = []
    for seed in range(3):
        pair = (
            dataclasses.replace(setup, seed=seed, cf_seed=0),
            dataclasses.replace(plain, seed=seed),
        )
        ranks = [results.ranks(cell, "test") for cell in pair]
        seeds.append(
            [[1 / np.log2(r + 2) if 0 <= r < 10 else 0.0 for r in of.rank_R] for of in ranks]
        )
    ours, theirs = np.mean([s[0] for s in seeds]), np.mean([s[1] for s in seeds])
    assert one.mean == pytest.approx(ours)
    assert one.baseline == pytest.approx(theirs)
    assert one.difference.mean == pytest.approx(ours - theirs)
    assert one.relative == pytest.approx((ours - theirs) / theirs)
    user_R = ranks[0].user_R
    difference_R = np.mean([np.subtract(*s) for s in seeds], axis=0)
    of_users = [difference_R[user_R == user].mean() for user in np.unique(user_R)]
    assert one.standardised == pytest.approx(np.mean(of_users) / np.std(of_users, ddof=1))
    assert one.p == one.p_holm  # a single test


def test_holms_correction_is_over_all_that_is_asked_at_once(results):
    found = effects(results, against_plain(results), "test", METRICS)
    adjusted = holm({name: one.p for name, one in found.items()})
    assert {name: one.p_holm for name, one in found.items()} == adjusted
    assert max(one.p_holm for one in found.values()) > max(one.p for one in found.values())


def test_where_no_setup_does_anything_no_verdict_says_so(tmp_path):
    made = [cell for cell in cells(recommenders=("ids",)) if cell.is_llm and not cell.guidance]
    make_results(tmp_path, made, seed_noise=0.1, gain=lambda _: 0.3, splits=("validation",))
    results = Results.read(tmp_path)
    compared = against_plain(results, "validation")
    found = effects(results, compared, "validation", METRICS)
    assert len(found) == 6
    assert {one.verdict for one in found.values()} == {"no difference shown"}


def test_words():
    found = Effect(0.2, 0.1, Interval(0.1, 0.05, 0.15), 0.01, 0.02, 0.5, 1.0, seeds=3)
    assert found.verdict == "better"
    assert found._replace(lower_is_better=True).verdict == "worse"
    assert found._replace(p_holm=0.05).verdict == "no difference shown"
    assert found._replace(seeds=1).verdict == "better (one seed)"
    below = found._replace(difference=Interval(-0.1, -0.2, -0.05))
    assert (below.verdict, below._replace(lower_is_better=True).verdict) == ("worse", "better")


def test_users_that_differ_in_nothing_have_no_standardised_difference():
    assert standardised(np.zeros(4), np.arange(4)) == 0
    assert standardised(np.ones(2), np.zeros(2, int)) == 0


def test_seeds_are_paired_and_those_of_a_cf_model_are_any(results):
    setup = aligned(results, cf="sasrec", recommender="ids")[0]
    plain, teacher = results.plain(setup, "test"), results.teacher(setup, "test")
    assert [(a.seed, b.seed) for a, b in results.pairs(setup, plain, "test")] == [
        (n, n) for n in range(3)
    ]
    assert [(a.seed, b.cf_seed) for a, b in results.pairs(setup, teacher, "test")] == [
        (n, 0) for n in range(3)
    ]
    assert setup_of(Cell("d", "r", seed=1, cf_seed=2)) == Cell("d", "r")


def test_a_setup_that_is_compared_with_several_is_not_pooled_with_itself(results):
    """What its three seeds do is the same each time: two degrees of freedom, not more."""
    best = aligned(results, cf="ease", recommender="ids")[0]
    teachers = results.setups("test", recommender="cf")
    both = effects(results, {one: (best, one) for one in teachers}, "test", ["ndcg@10"])
    assert len(both) == 3
    for one in teachers:
        alone = effects(results, {one: (best, one)}, "test", ["ndcg@10"])[one, "ndcg@10"]
        assert both[one, "ndcg@10"].difference == pytest.approx(alone.difference)


def test_what_has_no_likelihood_or_no_partner_is_not_compared(results):
    guided = results.setups("test", guidance=1.0, cf="ease", recommender="ids")[0]
    teacher = results.teacher(guided, "test")
    found = effects(results, {"guided": (guided, teacher)}, "test", METRICS)
    assert found.keys() == {("guided", "ndcg@10")}
    absent = dataclasses.replace(guided, alpha=0.3)
    assert effects(results, {"": (absent, teacher)}, "test", METRICS) == {}


def test_lines_of_other_rows_are_refused(tmp_path):
    plain, one = (
        Cell("d", "ids", **of, seed=0, steps=1, guidance=0.0)
        for of in ({"alpha": 0.0}, {"alpha": 0.5, "cf": "ease"})
    )
    make_results(tmp_path, [plain, one], splits=("test",))
    results = Results.read(tmp_path)
    path = tmp_path / results.lines[plain, "test"].ranks
    results.ranks(plain, "test")._replace(position_R=np.arange(600) + 1).write(path)
    with pytest.raises(UserError, match="'d ids .*not ranked on the same test rows"):
        effects(Results.read(tmp_path), {"": (setup_of(one), setup_of(plain))}, "test", METRICS)
    with pytest.raises(UserError, match="results.jsonl has no line"):
        Results.read(tmp_path / "nothing")


def test_seeds_of_a_cf_model_against_one_run_of_the_plain_llm_are_one_seed(tmp_path):
    plain = Cell("d", "ids", alpha=0.0, guidance=0.0, seed=0, steps=250)
    aligned = dataclasses.replace(plain, alpha=0.5, cf="ease")
    made = [plain, *(dataclasses.replace(aligned, cf_seed=n) for n in range(3))]
    teachers = [Cell("d", "cf", "ease", n) for n in range(3)]
    make_results(tmp_path, [*made, *teachers], splits=("test",))
    results = Results.read(tmp_path)
    setup = setup_of(aligned)
    one = effects(results, {"": (setup, setup_of(plain))}, "test", [NLL])["", NLL]
    assert (one.seeds, one.verdict) == (1, "better (one seed)")
    means = [results.values(cell, "test", NLL).mean() for cell in made]
    assert one.difference.mean == pytest.approx(np.mean(means[1:]) - means[0])
    teacher = results.teacher(setup, "test")
    guided = effects(results, {"": (setup, teacher)}, "test", ["ndcg@10"])["", "ndcg@10"]
    assert guided.seeds == 3  # each against its own


def test_temperatures_are_those_of_validation_rows(tmp_path):
    """Of all seeds there; the test rows, which another one would suit better, do not choose."""
    cells = [Cell("d", "ids", alpha=0.0, guidance=0.0, seed=seed, steps=1) for seed in (0, 1)]
    make_results(tmp_path, cells)
    results = Results.read(tmp_path)

    def write(cell, split, *nll_T):
        ranks = results.ranks(cell, split)
        nll_RxT = np.tile(np.float32(nll_T), (len(ranks.user_R), 1))
        more = {"nll_RxT": nll_RxT, "temperature_T": np.array([1.0, 2.0, 3.0])}
        ranks._replace(**more).write(tmp_path / results.lines[cell, split].ranks)

    for cell, of_validation in zip(cells, ((5, 3, 6), (5, 4, 2)), strict=True):
        write(cell, "validation", *of_validation)
        write(cell, "test", 1, 7, 2)
    results = Results.read(tmp_path)
    setup = setup_of(cells[0])
    assert results.temperature(setup) == 2.0
    assert results.mean(setup, "test", NLL) == 7
    tested = {of: line for of, line in results.lines.items() if of[1] == "test"}
    alone = Results(tmp_path, tested)
    assert alone.temperature(setup) is None
    assert alone.mean(setup, "test", NLL) == 1


@pytest.mark.parametrize(
    ("name", "values", "cf_seeds", "message"),
    [
        ("run.training.batch_size", (4, 64), (0, 0), "training.batch_size is 4 and 64"),
        ("decoding.beams", (5, 10), (0, 1), "decoding.beams is 5 and 10"),
        ("CF logits of the rows", ("a", "b"), (0, 0), "CF logits of the rows is 'a' and 'b'"),
        ("run.CF logits", ("a", "b"), (0, 1), None),
        ("run.seed", (0, 1), (0, 0), None),
        ("weights", ("a", "b"), (0, 0), None),
    ],
)
def test_seeds_that_were_made_from_other_inputs_are_refused(
    tmp_path, name, values, cf_seeds, message
):
    one = Cell("d", "ids", "ease", alpha=0.5, guidance=0.0, steps=1)
    seeds = [dataclasses.replace(one, seed=n, cf_seed=cf) for n, cf in enumerate(cf_seeds)]
    make_results(tmp_path, seeds, splits=("test",))
    lines = Results.read(tmp_path).lines
    changed = {
        of: dataclasses.replace(line, provenance={**line.provenance, "inputs": {name: value}})
        for (of, line), value in zip(lines.items(), values, strict=True)
    }
    results = Results(tmp_path, changed)
    if message is None:
        assert len(results.of_setup(setup_of(one), "test")) == 2
    else:
        both = f"seed=0 .*and 'd ids .*seed=1 .*on test rows, .*: {message}: compute one"
        with pytest.raises(UserError, match=both):
            results.of_setup(setup_of(one), "test")
