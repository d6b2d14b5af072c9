"""Pictures that hold something, and readable examples."""

import numpy as np
import pytest
from matplotlib.image import imread

from tca4rec_jax.evaluation.report import examples_text, plot_metrics, plot_training_curves
from tca4rec_jax.intervals import Interval

ROWS = {
    "SASRec": {"ndcg@10": Interval(0.058, 0.05, 0.0661), "users/s": 812.0},
    "LLM | alpha=0": {"ndcg@10": Interval(0.019, 0.01, 0.03), "steps": 60},
}


def drawn(path):
    """Whether a PNG holds more than a blank page."""
    pixels = imread(path)[..., :3]
    return pixels.min() < 0.5 and pixels.max() > 0.9


def test_pictures_are_drawn(tmp_path):
    curves = {
        "alpha=0": [{"step": s, "loss": 3.0 / s, "when": "now"} for s in range(1, 6)],
        "alpha=0.5": [{"step": 1, "loss": 2.0, "entropy": 1.0}],
    }
    keys = ("loss", "entropy", "grad_norm")
    plot_training_curves(tmp_path / "loss.png", curves, keys)
    plot_metrics(tmp_path / "metrics.png", ROWS, ["ndcg@10"])
    assert drawn(tmp_path / "loss.png")
    assert drawn(tmp_path / "metrics.png")
    # loss and entropy side by side, and nothing for what no run recorded
    height, width = imread(tmp_path / "loss.png").shape[:2]
    assert width == pytest.approx(2 * 5.0 / 3.6 * height, rel=0.02)


def test_a_label_is_drawn_as_it_is_spelt(tmp_path, monkeypatch):
    """Not as a formula (this one is an error), nor left out of the legend."""
    figures, label = [], r"_cheap, $5 to $\frac"
    save = "tca4rec_jax.evaluation.report.save_figure"
    monkeypatch.setattr(save, lambda path, figure: figures.append(figure))
    plot_metrics(tmp_path / "x.png", {label: ROWS["SASRec"]}, ["ndcg@10"])
    plot_training_curves(tmp_path / "y.png", {label: [{"step": 1, "loss": 2.0}]}, ("loss",))
    for figure in figures:
        figure.canvas.draw()
    bars, curves = (figure.axes[0] for figure in figures)
    (entry,) = curves.get_legend().get_texts()
    for text in (bars.get_yticklabels()[0], entry):
        words, formula = text._preprocess_math(text.get_text())
        assert (words.strip(), formula) == (label, False)


def test_pictures_of_nothing_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no quantity"):
        plot_training_curves(tmp_path / "x.png", {"a": []}, ("loss",))
    with pytest.raises(ValueError, match="needs a 'step'"):
        plot_training_curves(tmp_path / "x.png", {"a": [{"loss": 1.0}]}, ("loss",))
    with pytest.raises(ValueError, match=r"missing \[\('SASRec', 'hr@1'\)"):
        plot_metrics(tmp_path / "x.png", ROWS, ["hr@1"])
    with pytest.raises(ValueError, match="at least one row"):
        plot_metrics(tmp_path / "x.png", {}, ["hr@1"])
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
