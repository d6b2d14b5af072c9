"""report.html of an evaluation: its sections, its numbers, what rows it shows."""

import dataclasses
import json
import re
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
from browser import check_reading, chromium, seen

from tca4rec_jax.config import default_config
from tca4rec_jax.evaluation.comparison import NLL
from tca4rec_jax.evaluation.page import FILE, write_page
from tca4rec_jax.evaluation.page_rows import RankedRows, errors, rank_counts, ranks_side_by_side
from tca4rec_jax.evaluation.page_runs import curve_table, run_costs, settings
from tca4rec_jax.evaluation.rankings import CF, POPULAR, ModelRanking
from tca4rec_jax.intervals import Interval
from tca4rec_jax.pages.blocks import Numbers
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.reporting import write_results

pytestmark = pytest.mark.drawn
TITLES = ["Alien <1979>", "Brazil & co", "Contact", "Dune", "Eraserhead", "Fargo"]
LABELS = (POPULAR, CF, "LLM", "guided")
LOG = [
    {"step": s, "loss": 3 - s / 50, "tokens": 100, "seconds": 0.5, "mfu": 0.4} for s in range(50)
]

MADE = {"rows": "a" * 64, "evaluation.hits": "item", "lists.run.run.made_from": "c" * 64}
SWEEPS = {
    "run": MADE | {"compared.variants": [["lambda = 2", "run", 2.0]]},
    "other": MADE | {"rows": "b" * 64},
    "trained_anew": MADE | {"lists.run.run.made_from": "d" * 64},
    "by_title": MADE | {"evaluation.hits": "title"},
    "unknown": MADE | {"lists.unknown.run.made_from": "c" * 64},
    "old": {},
}


def ranked(seed=0):
    """Three rows: in the last the LLM misses what the CF model has first."""
    rng = np.random.default_rng(seed)
    rows = SimpleNamespace(
        history_RxH=np.array([[-1, 1], [2, 3], [4, 5]]), target_R=np.array([0, 1, 2])
    )
    ranks = {POPULAR: [0, 1, 2], CF: [1, 5, 0], "LLM": [0, -1, -1], "guided": [1, -1, 0]}
    nll = {"LLM": [1.0, 9.0, 4.0], "guided": [np.nan] * 3}
    rankings = {
        label: ModelRanking(
            np.stack([rng.permutation(6)[:3] for _ in range(3)]),
            np.array(ranks[label]),
            np.array(ranks[label]),
            np.array(nll.get(label, [2.0, 2.0, 2.0]))[:, None].repeat(2, 1),
        )
        for label in LABELS
    }
    return RankedRows(TITLES, rows, rankings, "item", (1.0, 2.0))


def made(number):
    return Interval(number, number / 2, number * 2)


def results_of(config):
    def model(number, label):
        by_item = {
            f"{name}@{k}": made(number + k / 100) for name in ("hr", "ndcg", "mrr") for k in (1, 3)
        }
        nll = {f"temperature {t}": made(number + 1) for t in (1, 2)}
        return {
            "by item": by_item,
            "by title": by_item,
            NLL: nll | {"best": made(number + 1), "best temperature": 1.0},
            "lists": {f"coverage@{k}": number for k in (1, 3)},
            "slices": {"head": {"ndcg@3": made(number)}},
            "calibration": {f"{n}@{k}": 0.1 * k for n in ("mass", "hr", "ece") for k in (1, 3)}
            if label in (POPULAR, CF)
            else None,
        }

    models = {label: model(0.1234 * (n + 1), label) for n, label in enumerate(LABELS)}
    models["guided"][NLL] = None
    variants = [["LLM", "run", 0.0], ["guided", "run", 1.0]]
    inputs = {"compared.variants": variants, **MADE}
    return {
        "rows": 3,
        "users": 2,
        "split": "test",
        "ranked": "6 items",
        "hits": "item",
        "slices": {"head": 2},
        "runs": {"run": 50},
        "models": models,
        "differences": {"LLM - CF model": {"ndcg@3": Interval(-0.5, -0.75, 0.25)}},
        "config": json.loads(config.to_json_best_effort()),
        "provenance": dataclasses.asdict(Provenance("evaluation", "launch/evaluate.py", inputs)),
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(path, text, results) of a work directory with a sweep of the same and those of others."""
    folder, config = tmp_path_factory.mktemp("W"), default_config()
    config.evaluation.cutoffs = (1, 3)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    run = SimpleNamespace(
        log=folder / "log.jsonl",
        drawn=["loss"],
        config={"objective": {"alpha": 0.875}, "gone": 1},
    )
    experiment = SimpleNamespace(config=config, workdir=folder, runs={"run": run})
    results = results_of(config)
    for name, inputs in SWEEPS.items():
        of = {"ndcg@3": made(0.3), "hr@3": made(0.4)}
        swept = {"lambda = 0": of, "lambda = 2": of, CF: of}
        made_from = {"provenance": {"inputs": inputs}} if inputs else {}
        write_results(folder / f"sweep_{name}.json", {"models": swept, **made_from})
    write_page(folder, experiment, results, ranked(), [1])
    path = folder / FILE
    return path, path.read_text("utf-8"), results


def test_the_report_has_its_sections(report):
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", report[1])
    assert headings == [
        "What was run",
        "Accuracy",
        "By slice",
        "Likelihood and calibration",
        "LLM rank against CF rank",
        "Coverage and character of the lists",
        "Guidance: run",
        "Examples",
        "Errors worth reading",
        "Training",
        "Costs",
        "Made from",
    ]
    assert "http" not in re.sub('data:[^"]*|http-equiv', "", report[1])


def test_its_numbers_are_those_of_the_results(report):
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", report[1])
    shown = {unescape(cell).replace("\xa0", " ") for cell in cells}
    for one in report[2]["models"].values():
        for metric in ("ndcg@3", "hr@3"):
            mean, low, high = one["by item"][metric]
            assert f"{mean:.4f} [{low:.4f}, {high:.4f}]" in shown
    assert "-0.5000 [-0.7500, 0.2500]" in shown
    assert {"objective.alpha", "0.875", "a" * 12} <= shown
    assert "gone" not in shown


def test_every_picture_has_words_and_titles_are_escaped(report):
    alts = re.findall(r'<img[^>]*alt="([^"]*)"', report[1])
    assert len({*alts}) == len(alts) > 8
    assert "NDCG@3: Most popular 0.153; " in alts[0]
    assert "Alien &lt;1979&gt;" in report[1]
    assert "Alien <" not in report[1]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_can_be_read_in_a_browser(report, width, dark):
    """With closed tables open, too."""
    address = report[0].as_uri()
    with chromium() as browser, seen(browser, address, width=width, dark=dark) as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        check_reading(page)
        images = page.evaluate("[...document.images].map(one => one.naturalWidth)")
        assert min(images) > 200


def test_ranks_are_counted_in_bins():
    counts = rank_counts(np.array([0, 1, 2, 5, -1]), np.array([0, -1, 2, -1, 1]), 6, 3)
    assert counts == {
        "1": {"1": 1, "2 to 3": 0, "none": 0},
        "2 to 3": {"1": 0, "2 to 3": 1, "none": 1},
        "4 to 6": {"1": 0, "2 to 3": 0, "none": 1},
        "none": {"1": 0, "2 to 3": 1, "none": 0},
    }


def test_a_list_ends_where_the_llm_ends_it():
    """Not where that of the CF model does, which is as long as the largest K."""
    made = ranked()
    longer = made.rankings["LLM"]._replace(
        items_RxM=np.stack([np.arange(5)] * 3), rank_R=np.array([4, 3, -1])
    )
    (section,) = ranks_side_by_side(made._replace(rankings=made.rankings | {"LLM": longer}))
    tables = [block.rows for block in section.blocks if isinstance(block, Numbers)]
    assert tables[0]["2 to 3"] == {"1": 0, "2 to 3": 0, "4 to 5": 1, "none": 0}
    assert [*tables[1]["1"]] == ["1", "2 to 3", "none"]


def test_errors_are_the_least_expected_and_what_the_cf_model_knew():
    _, first, second, known = errors(ranked())
    assert [one.title for one in (first, second)] == [
        "Least expected: row 1",
        "Least expected: row 2",
    ]
    assert known.title == "Known to the CF model: row 2"
    assert "probability of 1 in 8,103; its rank by the CF model is 6" in first.blocks[0].text
    target = first.blocks[1].posters[0]
    assert (target.title, target.is_target) == ("Brazil & co", True)


def test_settings_are_those_that_differ_from_the_defaults():
    changed = settings({"a": [{"objective": {"alpha": 0.875}}, {"objective": {"alpha": 0.1}}]})
    default = default_config().objective.alpha
    assert changed == {"objective.alpha": {"default": str(default), "a": "0.875; 0.1"}}


def test_costs_and_curves_are_of_the_log():
    validated = [*LOG, {"step": 50, "validation/ndcg@3": 0.5, "validation/seconds": 35.0}]
    assert run_costs(validated) == {
        "minutes": "1.0",
        "steps": 50,
        "million tokens": "0.005",
        "tokens a second": "200",
        "MFU": "0.40",
    }
    table = curve_table({"run": validated}, "loss")
    assert len(table) == 10
    assert table["run, 0 to 4"] == {"loss": pytest.approx(2.96)}
