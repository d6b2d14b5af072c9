"""Pictures that hold something, and readable examples."""

import numpy as np
import pytest
from matplotlib.image import imread

from tca4rec_jax.evaluation.pictures import (
    DRAWN,
    metrics_figure,
    smoothed,
    training_figure,
)
from tca4rec_jax.evaluation.report import examples_text
from tca4rec_jax.intervals import Interval
from tca4rec_jax.reporting import save_figure

ROWS = {
    "SASRec": {"ndcg@10": Interval(0.058, 0.05, 0.0661), "users/s": 812.0},
    "LLM | alpha=0": {"ndcg@10": Interval(0.019, 0.01, 0.03), "steps": 60},
}


def drawn(path):
    """Whether a PNG holds more than a blank page."""
    pixels = imread(path)[..., :3]
    return pixels.min() < 0.5 and pixels.max() > 0.9


@pytest.mark.usefixtures("drawn")
def test_pictures_are_drawn(tmp_path):
    curves = {
        "alpha=0": [{"step": s, "loss": 3.0 / s, "when": "now"} for s in range(1, 6)],
        "alpha=0.5": [{"step": 1, "loss": 2.0, "entropy": 1.0}],
    }
    keys = ("loss", "entropy", "grad_norm")
    save_figure(tmp_path / "loss.png", training_figure(curves, keys))
    save_figure(tmp_path / "metrics.png", metrics_figure(ROWS, ["ndcg@10"]))
    assert drawn(tmp_path / "loss.png")
    assert drawn(tmp_path / "metrics.png")
    # loss and entropy side by side, and nothing for what no run recorded
    height, width = imread(tmp_path / "loss.png").shape[:2]
    assert width == pytest.approx(2 * 5.0 / 3.6 * height, rel=0.02)


def test_a_label_is_drawn_as_it_is_spelt():
    """Not as a formula (this one is an error), nor left out of the legend."""
    label = r"_cheap, $5 to $\frac"
    figures = [
        metrics_figure({label: ROWS["SASRec"]}, ["ndcg@10"]),
        training_figure({label: [{"step": 1, "loss": 2.0}]}, ("loss",)),
    ]
    for figure in figures:
        figure.canvas.draw()
    bars, curves = (figure.axes[0] for figure in figures)
    (entry,) = curves.get_legend().get_texts()
    for text in (bars.get_yticklabels()[0], entry):
        words, formula = text._preprocess_math(text.get_text())
        assert (words.strip(), formula) == (label, False)


def test_a_noisy_curve_is_smoothed_with_its_values_behind():
    curve = [{"step": step, "loss": float(step % 2)} for step in range(100)]
    (panel,) = training_figure({"a": curve}, ("loss",)).axes
    raw, smooth = (line.get_ydata() for line in panel.lines)
    np.testing.assert_array_equal(raw, [one["loss"] for one in curve])
    assert np.ptp(smooth[20:]) < 0.2
    assert smooth[0] == raw[0]  # no bias to 0 at first


def test_of_a_long_curve_some_points_are_drawn_of_the_average_of_all():
    values = np.random.default_rng(0).normal(size=5000)
    curve = [{"step": step, "loss": value} for step, value in enumerate(values)]
    (panel,) = training_figure({"a": curve}, ("loss",)).axes
    raw, smooth = panel.lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == DRAWN
    assert (raw.get_xdata()[0], raw.get_xdata()[-1]) == (0, 4999)
    at = raw.get_xdata().astype(int)
    np.testing.assert_array_equal(raw.get_ydata(), values[at])
    np.testing.assert_array_equal(smooth.get_ydata(), smoothed(values)[at])


def test_runs_that_are_alike_share_look_and_label_and_no_two_others_do():
    curves = {f"run {n}": [{"step": 1, "loss": float(n)}] for n in range(9)}
    alike = {"run 0": "both", "run 8": "both"}
    figure = training_figure(curves, ("loss",), alike=alike)
    (panel,), (legend,) = figure.axes, figure.legends
    looks = [(line.get_color(), line.get_linestyle()) for line in panel.lines]
    assert looks[0] == looks[8]
    assert len({*looks}) == 8
    assert [one.get_text() for one in legend.get_texts()] == ["both", *[*curves][1:8]]


def test_pictures_of_nothing_are_errors():
    with pytest.raises(ValueError, match="no quantity"):
        training_figure({"a": []}, ("loss",))
    with pytest.raises(ValueError, match="needs a 'step'"):
        training_figure({"a": [{"loss": 1.0}]}, ("loss",))
    with pytest.raises(ValueError, match=r"missing \[\('SASRec', 'hr@1'\)"):
        metrics_figure(ROWS, ["hr@1"])
    with pytest.raises(ValueError, match="at least one row"):
        metrics_figure({}, ["hr@1"])


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
