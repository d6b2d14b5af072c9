"""What results.json holds."""

from types import SimpleNamespace

import numpy as np
import pytest

from tca4rec_jax.config import default_config
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.decoding.filters import ItemFilter
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import Comparison
from tca4rec_jax.evaluation.details import write_details
from tca4rec_jax.evaluation.evaluate import sweep_guidance
from tca4rec_jax.evaluation.lists import ListMetrics
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.evaluation.summary import (
    check_cutoffs,
    ranked_items,
    summarise,
    table_cells,
    write_tables,
)
from tca4rec_jax.intervals import resampled_users
from tca4rec_jax.metrics import hit_rate, mean_metrics


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr("tca4rec_jax.evaluation.slices.LEAST_USERS", 1)


CALIBRATIONS = {"CF model": {"ece@1": 0.1}}
EVERY = ["all", "warm item", "cold item", "warm user", "cold user", "head", "tail"]


def results_of(config, *, tied=0, candidates=False):
    """(results, rankings) of `evaluated`."""
    experiment, rows, rankings, compared = evaluated(config, tied=tied)
    vectors_IxD = np.random.default_rng(0).normal(size=(10, 2))
    lists = None if candidates else ListMetrics.of(experiment, rows, vectors_IxD)
    return summarise(experiment, rows, rankings, compared, lists, CALIBRATIONS), rankings


def evaluated(config, *, tied=0):
    """20 rows of 10 users, and rankings; users and items 5 to 9 were not trained on."""
    rng = np.random.default_rng(0)
    variants = (("LLM", "run", 0.0), ("guided", "run", 1.0))
    compared = Comparison(variants, (("LLM", "CF model"), ("guided", "CF model")))
    temperatures = len(config.evaluation.temperatures)

    def ranking(guided=False):
        nll_RxT = np.full((20, temperatures), np.nan) if guided else rng.random((20, temperatures))
        lists_RxM = np.stack([rng.permutation(10)[:3] for _ in range(20)])
        return ModelRanking(lists_RxM, *rng.integers(-1, 12, (2, 20)), nll_RxT)

    rankings = {label: ranking(label == "guided") for label in compared.labels}
    items, times = rng.permuted(np.tile(np.arange(10), (20, 1)), axis=1)[:, :3], np.arange(60)
    times[3 * np.arange(tied) + 2] -= 1
    split = ItemSequences(np.arange(20) // 2, items.ravel(), np.arange(0, 61, 3), times)
    rows = EvaluationRows("test", split, split.last_positions, items[:, :2], items[:, 2])
    train = ItemSequences(np.arange(5), np.arange(5), np.arange(6), np.arange(5))
    data = SimpleNamespace(
        catalogue=SimpleNamespace(num_items=10), splits={"train_sequences": train, "test": split}
    )
    allowed = ItemFilter(np.ones(10, bool), exclude_history=True)
    experiment = SimpleNamespace(
        config=config,
        data=data,
        run_step={"run": 850}.get,
        item_filter=allowed,
    )
    return experiment, rows, rankings, compared


@pytest.fixture
def draws(monkeypatch):
    """A list that has an entry for every draw of users."""
    found = []

    def counted(*given):
        found.append(given)
        return resampled_users(*given)

    monkeypatch.setattr("tca4rec_jax.intervals.resampled_users", counted)
    return found


def test_all_intervals_of_an_evaluation_are_of_one_draw(draws):
    results_of(default_config())
    assert len(draws) == 1


def test_all_intervals_of_a_sweep_are_of_one_draw(draws, monkeypatch, tmp_path):
    config = default_config()
    experiment, rows, rankings, _ = evaluated(config)
    experiment.recipe = SimpleNamespace(evaluated_by="rankings")
    llms = {"lambda = 0": rankings["LLM"], "lambda = 2": rankings["guided"]}
    for name, found in {
        "Experiment": experiment,
        "EvaluationRows.of": rows,
        "inputs_of": {},
        "cf_models": None,
        "rank_cf_models": rankings,
        "rank_llms": llms,
    }.items():
        path = f"tca4rec_jax.evaluation.evaluate.{name}"
        monkeypatch.setattr(path, lambda *_, found=found: found)
    found = sweep_guidance(config, tmp_path, "", [2])
    assert len(draws) == 1
    assert list(found["models"]) == [*llms, "CF model"]
    names = ["NDCG@10 - lambda = 0", "NDCG@10 - CF model"]
    assert [list(gains) for gains in found["differences"].values()] == [names] * 2
    means = {label: one["ndcg@10"].mean for label, one in found["models"].items()}
    for label, gains in found["differences"].items():
        for name, gain in gains.items():
            other = name.removeprefix("NDCG@10 - ")
            assert gain.mean == pytest.approx(means[label] - means[other])
    assert {path.suffix for path in tmp_path.glob("sweep_untrained.*")} == {".json", ".md", ".png"}


@pytest.mark.parametrize("tied", [6, 0])
def test_results_hold_every_metric_of_every_model(tied):
    config = default_config()
    results, rankings = results_of(config, tied=tied)
    assert list(results) == [
        *("rows", "users", "split", "items", "ranked", "hits", "slices", "runs", "models"),
        *("differences", "config"),
    ]
    assert (results["rows"], results["users"], results["items"]) == (20, 10, 10)
    assert results["ranked"] == "10 items but those of its history"
    assert results["runs"] == {"run": 850}
    assert list(results["slices"]) == [*EVERY[1:], *(("tied", "untied") if tied else ())]
    assert results["slices"].get("tied", 0) == tied
    assert list(results["models"]) == ["Most popular", "CF model", "LLM", "guided"]
    for label, metrics in results["models"].items():
        assert list(metrics) == [
            *("by item", "by title", "nll per title", "lists", "slices", "calibration")
        ]
        for part, chosen_R in (("tied", np.arange(20) < 6), ("untied", np.arange(20) >= 6)):
            if tied:
                expected = mean_metrics(rankings[label].rank_R[chosen_R], (10,))
                shown = metrics["slices"][part]
                assert list(shown) == ["hr@10", "ndcg@10"]
                for name, interval in shown.items():
                    assert interval.mean == pytest.approx(expected[name], rel=1e-12)
        assert (metrics["nll per title"] is None) == (label == "guided")
        names = {name.partition("@")[0] for name in metrics["lists"]}
        several = {"recall", "novelty", "popularity", "diversity"}
        assert names == several | {"coverage", "gini", "popularity lift"}
        assert metrics["calibration"] == CALIBRATIONS.get(label)
    nll = results["models"]["LLM"]["nll per title"]
    assert list(nll)[-2:] == ["best", "best temperature"]
    assert nll["best"].mean == pytest.approx(rankings["LLM"].nll_RxT.mean(axis=0).min())
    differences = results["differences"]
    assert list(differences["LLM - CF model"]) == ["hr@10", "ndcg@10", "nll per title"]
    assert list(differences["guided - CF model"]) == ["hr@10", "ndcg@10"]  # guided: no likelihood


def test_lists_of_candidates_are_as_those_were_drawn(tmp_path):
    results, _ = results_of(default_config(), candidates=True)
    assert [one["lists"] for one in results["models"].values()] == [None] * 4
    write_details(tmp_path, results, "ndcg@10")
    assert "The lists" not in (tmp_path / "details.md").read_text()


def test_a_hit_by_title_counts_in_table_differences_and_slices():
    config = default_config()
    config.evaluation.update(hits="title", cutoffs=(2, 5))
    results, rankings = results_of(config)
    ranks = {label: one.title_rank_R for label, one in rankings.items()}
    cell = table_cells(results["models"]["LLM"], config)
    assert cell["HR@5"] == pytest.approx(hit_rate(ranks["LLM"], 5).mean())
    assert {"by item", "HR@2", "NDCG@2", "NDCG@5, 95% interval"} <= cell.keys()
    gain = results["differences"]["LLM - CF model"]["hr@5"].mean
    assert gain == pytest.approx(
        np.mean(hit_rate(ranks["LLM"], 5) - hit_rate(ranks["CF model"], 5))
    )
    cold = results["models"]["LLM"]["slices"]["cold user"]["hr@5"].mean
    assert cold == pytest.approx(hit_rate(ranks["LLM"][10:], 5).mean())


@pytest.mark.usefixtures("drawn")
def test_tables_say_what_was_ranked_and_every_slice_is_shown(tmp_path):
    config = default_config()
    results, _ = results_of(config)
    write_tables(tmp_path, results, config)
    first, *_ = (tmp_path / "results.md").read_text().splitlines()
    assert first.startswith("20 test rows, each ranked over 10 items but those of its history; NLL")
    write_details(tmp_path, results, "ndcg@10")
    text = (tmp_path / "details.md").read_text()
    for label in results["models"]:
        assert text.count(f"| {label}, K = 5 |") == 3  # by item, by title, lists
    assert [line.split("|")[1].strip() for line in text.splitlines()[-len(EVERY) :]] == EVERY
    assert (tmp_path / "slices.png").stat().st_size > 1000


def test_a_k_that_the_lists_of_the_llms_do_not_reach_is_refused():
    config = default_config()
    check_cutoffs(config)
    config.evaluation.cutoffs = (10, 20)
    with pytest.raises(UserError, match="has 20, .* decoding.beams=10 .* give --config.decoding"):
        check_cutoffs(config)
    config.decoding.beams = 20
    check_cutoffs(config)
    config.evaluation.candidates = 20  # every candidate would be a hit
    with pytest.raises(UserError, match="has 20, but evaluation.candidates=20 are ranked: give"):
        check_cutoffs(config)
    config.evaluation.candidates = 21
    check_cutoffs(config)


def test_what_is_ranked_is_said_in_words():
    config = default_config()
    allowed_I = np.arange(10) < 7

    def words(**given):
        return ranked_items(SimpleNamespace(config=config, item_filter=ItemFilter(**given)))

    assert words(allowed_I=np.ones(10, bool)) == "10 items"
    assert words(allowed_I=allowed_I) == "7 items that may be recommended"
    config.evaluation.candidates = 4
    found = words(allowed_I=allowed_I, exclude_history=True)
    assert found == "4 items that were drawn for it but those of its history"
