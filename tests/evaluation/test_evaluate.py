"""What results.json holds."""

from types import SimpleNamespace

import numpy as np
import pytest

from tca4rec_jax.config import default_config
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.comparison import Comparison
from tca4rec_jax.evaluation.rankings import EvaluationRows, ModelRanking
from tca4rec_jax.evaluation.summary import check_cutoffs, summarise
from tca4rec_jax.metrics import mean_metrics


@pytest.mark.parametrize("tied", [6, 0])
def test_results_hold_every_metric_of_every_model(tied):
    rng = np.random.default_rng(0)
    config = default_config()
    variants = (("LLM", "run", 0.0), ("guided", "run", 1.0))
    compared = Comparison(variants, (("LLM", "CF model"), ("guided", "CF model")))
    temperatures = len(config.evaluation.temperatures)

    def ranking(guided=False):
        nll_RxT = np.full((20, temperatures), np.nan) if guided else rng.random((20, temperatures))
        return ModelRanking(rng.integers(0, 30, (20, 3)), *rng.integers(-1, 12, (2, 20)), nll_RxT)

    rankings = {label: ranking(label == "guided") for label in compared.labels}
    tied_R = np.arange(20) < tied
    rows = EvaluationRows(
        SimpleNamespace(tied=tied_R, user=np.arange(20) // 2), None, None, np.zeros(20, np.int32)
    )
    data = SimpleNamespace(catalogue=SimpleNamespace(num_items=30))
    experiment = SimpleNamespace(config=config, data=data, run_step={"run": 850}.get)
    results = summarise(experiment, rows, rankings, compared)

    assert list(results) == [
        "rows",
        "users",
        "tied_rows",
        "split",
        "items",
        "runs",
        "models",
        "differences",
        "config",
    ]
    assert (results["rows"], results["tied_rows"], results["items"]) == (20, tied, 30)
    assert results["runs"] == {"run": 850}
    assert list(results["models"]) == ["Most popular", "CF model", "LLM", "guided"]
    for label, metrics in results["models"].items():
        assert list(metrics) == [
            *("by item", "by title"),
            *(("by item, tied rows", "by item, untied rows") if tied else ()),
            "nll per title",
        ]
        for part, chosen_R in (("tied", tied_R), ("untied", ~tied_R)) if tied else ():
            expected = mean_metrics(rankings[label].rank_R[chosen_R], (10,))
            shown = metrics[f"by item, {part} rows"]
            assert {name: interval.mean for name, interval in shown.items()} == (
                pytest.approx(expected, rel=1e-12)
            )
        assert (metrics["nll per title"] is None) == (label == "guided")
    nll = results["models"]["LLM"]["nll per title"]
    assert list(nll)[-2:] == ["best", "best temperature"]
    assert nll["best"].mean == pytest.approx(rankings["LLM"].nll_RxT.mean(axis=0).min())
    differences = results["differences"]
    assert list(differences["LLM - CF model"]) == ["hr@10", "ndcg@10", "nll per title"]
    assert list(differences["guided - CF model"]) == ["hr@10", "ndcg@10"]  # guided: no likelihood


def test_a_k_that_the_lists_of_the_llms_do_not_reach_is_refused():
    config = default_config()
    check_cutoffs(config)
    config.evaluation.cutoffs = (10, 20)
    with pytest.raises(UserError, match="has 20, .* decoding.beams=10 .* give --config.decoding"):
        check_cutoffs(config)
    config.decoding.beams = 20
    check_cutoffs(config)
