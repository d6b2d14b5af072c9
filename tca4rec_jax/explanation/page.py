"""An explanation as one HTML page that needs no network; titles are escaped."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from tca4rec_jax.explanation.explanation import Explanation
from tca4rec_jax.explanation.terminal import counted, forced_branch, is_open
from tca4rec_jax.terminal import plain_text


def explanation_page(explanation: Explanation) -> str:
    """The page: list, tree, effects and comparisons, for a screen of any width and for paper."""
    effects = [abs(x) for item in explanation.history for x in item.effects]
    return _template().render(
        explanation=explanation,
        data=explanation.to_json(),
        largest_effect=max(effects, default=0.0) or 1.0,
        is_open=is_open,
        forced_branch=forced_branch,
        counted=counted,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = lambda text: plain_text(text.strip())
    return environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
