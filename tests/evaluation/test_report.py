import io
import json

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from tca4rec_jax.evaluation.report import (
    console_table,
    examples_text,
    markdown_table,
    plot_metrics,
    plot_training_curves,
    write_results,
)
from tca4rec_jax.metrics import Interval

ROWS = {
    "SASRec": {"ndcg@10": Interval(0.058, 0.05, 0.0661), "users/s": 812.0},
    "LLM | alpha=0": {"ndcg@10": Interval(0.019, 0.01, 0.03), "steps": 60},
}


def test_markdown_table_has_every_column_and_dashes_for_gaps():
    assert markdown_table(ROWS, first_column="model", digits=3).splitlines() == [
        "| model | ndcg@10 | users/s | steps |",
        "| --- | ---: | ---: | ---: |",
        "| SASRec | 0.058 [0.050, 0.066] | 812.000 | - |",
        "| LLM \\| alpha=0 | 0.019 [0.010, 0.030] | - | 60 |",
    ]


def test_console_table_shows_the_same_cells():
    out = io.StringIO()
    Console(file=out, width=120).print(console_table(ROWS, title="Test rows", digits=3))
    for cell in ("Test rows", "SASRec", "0.058 [0.050, 0.066]", "812.000", "60"):
        assert cell in out.getvalue()


def test_results_survive_the_way_through_json(tmp_path):
    path = tmp_path / "run" / "results.json"
    results = {"test": ROWS, "count": np.int64(3), "hr": np.float32(0.5), "ranks": np.arange(3)}
    write_results(path, results)
    read = json.loads(path.read_text())
    assert read["test"]["SASRec"]["ndcg@10"] == {"mean": 0.058, "low": 0.05, "high": 0.0661}
    assert (read["count"], read["hr"], read["ranks"]) == (3, 0.5, [0, 1, 2])
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_bad_results_are_named_and_leave_the_old_file_alone(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"a": 1})
    with pytest.raises(ValueError, match=r"result test\.nll is nan"):
        write_results(path, {"test": {"nll": float("nan")}})
    with pytest.raises(TypeError, match=r"result model\.0 is a object"):
        write_results(path, {"model": [object()]})
    assert json.loads(path.read_text()) == {"a": 1}


def drawn(path):
    """Whether a PNG holds more than a blank page."""
    pixels = imread(path)[..., :3]
    return pixels.min() < 0.5 and pixels.max() > 0.9


def test_pictures_are_drawn(tmp_path):
    curves = {
        "alpha=0": [{"step": s, "loss": 3.0 / s, "when": "now"} for s in range(1, 6)],
        "alpha=0.5": [{"step": 1, "loss": 2.0, "entropy": 1.0}],
    }
    plot_training_curves(tmp_path / "loss.png", curves)
    plot_metrics(tmp_path / "metrics.png", ROWS, ["ndcg@10"])
    assert drawn(tmp_path / "loss.png")
    assert drawn(tmp_path / "metrics.png")
    # loss and entropy side by side, and nothing for the text field
    height, width = imread(tmp_path / "loss.png").shape[:2]
    assert width == pytest.approx(2 * 5.0 / 3.6 * height, rel=0.02)


def test_pictures_of_nothing_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no quantity"):
        plot_training_curves(tmp_path / "x.png", {"a": []})
    with pytest.raises(ValueError, match="needs a 'step'"):
        plot_training_curves(tmp_path / "x.png", {"a": [{"loss": 1.0}]})
    with pytest.raises(ValueError, match=r"missing \[\('SASRec', 'hr@1'\)"):
        plot_metrics(tmp_path / "x.png", ROWS, ["hr@1"])
    with pytest.raises(ValueError, match="at least one row"):
        markdown_table({})
    assert not list(tmp_path.iterdir())


def test_examples_show_history_recommendations_and_what_came_next():
    titles = ["Alien (1979)", "Brazil (1985)", "Contact (1997)", "Dune (1984)"]
    text = examples_text(
        titles,
        np.array([[-1, -1], [-1, 3], [0, 1]]),
        {"LLM": np.array([[0, 1, 2], [2, 0, 1], [3, 2, -1]])},
        np.array([1, 2, 0]),
        rows=[1, 2],
        top=2,
    )
    first, second = text.split("### Example 2")
    assert "- Dune (1984)" in first
    assert "1. Contact (1997) **(what came next)**" in first
    assert "2. Alien (1979)" in first
    assert "Brazil" not in first  # third place
    assert second.index("- Alien (1979)") < second.index("- Brazil (1985)")
    assert "What came next: **Alien (1979)**" in second
