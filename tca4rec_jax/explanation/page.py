"""An explanation as one HTML page that needs no network; titles are escaped."""

from pathlib import Path

from tca4rec_jax.explanation.explanation import Explanation
from tca4rec_jax.explanation.terminal import counted, forced_branch, is_open
from tca4rec_jax.pages.html import template


def explanation_page(explanation: Explanation) -> str:
    """The page: list, tree, effects and comparisons, for a screen of any width and for paper."""
    effects = [abs(x) for item in explanation.history for x in item.effects]
    return template(Path(__file__).with_name("page.html")).render(
        explanation=explanation,
        data=explanation.to_json(),
        largest_effect=max(effects, default=0.0) or 1.0,
        is_open=is_open,
        forced_branch=forced_branch,
        counted=counted,
    )
