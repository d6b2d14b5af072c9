"""Writes ranking_metrics.json: metrics of made lists by ranx 0.3.20 and RecBole 1.2.1.

    python -m pip install ranx==0.3.20 scikit-learn
    python -m pip download --no-deps recbole==1.2.1 && unzip recbole-1.2.1-py3-none-any.whl
    PYTHONPATH=. python tests/goldens/make_ranking_metrics.py

RecBole's metrics are its own functions, on NumPy arrays; PyTorch, which they only import, is left
out.
"""

import enum
import importlib.metadata
import json
import sys
import types
from pathlib import Path

import numpy as np
from ranx import Qrels, Run, evaluate

ROWS, ITEMS, PLACES, CUTOFFS = 40, 30, 10, (1, 3, 5, 10)


def made_lists():
    """Lists, the targets of each row (the first is the target), the items' training counts."""
    rng = np.random.default_rng(0)
    lists = [rng.permutation(ITEMS)[:PLACES].tolist() for _ in range(ROWS)]
    targets = [rng.permutation(ITEMS)[: rng.integers(1, 6)].tolist() for _ in range(ROWS)]
    return lists, targets, rng.integers(0, 50, ITEMS).tolist()


def by_ranx(lists, targets):
    names = [f"{name}@{k}" for name in ("hit_rate", "mrr", "ndcg", "recall") for k in CUTOFFS]
    run = Run(
        {str(r): {str(i): 1.0 / (1 + m) for m, i in enumerate(one)} for r, one in enumerate(lists)}
    )
    single, several = (
        evaluate(
            Qrels({str(r): dict.fromkeys(map(str, one[:n]), 1) for r, one in enumerate(targets)}),
            run,
            names,
        )
        for n in (1, None)
    )
    found = {name: float(single[name]) for name in names if not name.startswith("recall")}
    return found | {f"recall@{k}": float(several[f"recall@{k}"]) for k in CUTOFFS}


def by_recbole(lists, targets, counts):
    sys.modules |= {name: types.ModuleType(name) for name in ("torch", "recbole", "recbole.utils")}
    sys.modules["recbole"].__path__ = ["recbole"]
    sys.modules["recbole.utils"].EvaluatorType = enum.Enum("EvaluatorType", "RANKING VALUE")
    package = types.ModuleType("recbole.evaluator")  # without the imports of its __init__
    package.__path__ = ["recbole/evaluator"]
    sys.modules["recbole.evaluator"] = package
    vars(np)["float"] = float  # as NumPy had it when RecBole 1.2.1 was written
    from recbole.evaluator import metrics

    config, listed = {"topk": CUTOFFS, "metric_decimal_place": 15}, np.array(lists)
    found = {}
    for kind, name, several in (
        (metrics.Hit, "hit", False),
        (metrics.MRR, "mrr", False),
        (metrics.NDCG, "ndcg", False),
        (metrics.Recall, "recall", True),
    ):
        kept = targets if several else [one[:1] for one in targets]
        hits = np.array([np.isin(one, own) for one, own in zip(listed, kept, strict=True)])
        lengths = [np.array([len(own) for own in kept])] if name in ("ndcg", "recall") else []
        metric = kind(config)
        found |= metric.topk_result(name, metric.metric_info(hits, *lengths))
    metric = metrics.AveragePopularity(config)
    popularity = metric.get_pop(listed, dict(enumerate(counts)))
    found |= metric.topk_result("averagepopularity", metric.metric_info(popularity))
    for k in CUTOFFS:
        found[f"itemcoverage@{k}"] = metrics.ItemCoverage(config).get_coverage(listed[:, :k], ITEMS)
        found[f"giniindex@{k}"] = metrics.GiniIndex(config).get_gini(listed[:, :k], ITEMS)
    return {name: float(value) for name, value in found.items()}


if __name__ == "__main__":
    lists, targets, counts = made_lists()
    golden = {
        "made by": f"ranx {importlib.metadata.version('ranx')}, RecBole 1.2.1",
        "lists": lists,
        "targets": targets,
        "counts": counts,
        "ranx": by_ranx(lists, targets),
        "recbole": by_recbole(lists, targets, counts),
    }
    path = Path(__file__).with_name("ranking_metrics.json")
    path.write_text(json.dumps(golden) + "\n")
