"""Explains a list: the choices that made it, of the LLM, of the CF model and of both.

    python launch/explain.py --workdir=runs/quickstart --run=aligned --guidance=1 \\
        --item="Toy Story (1995)" --item="Fargo (1996)" --html=explained.html
    python launch/explain.py ... --split=test --row=7 --compare="Heat (1995)" --compare=Casino

Shows the list and its decoding tree: how every prefix of a listed title goes on, with the
probability of the best --children and of the others together; what guidance has changed; what each
item of the history adds to the scores; and why the first item of --compare stands before the
second. Reads WORKDIR/data, the trained CF model in WORKDIR/cf and the run in WORKDIR/llm. Writes
the same as files to --json and --html, if they are given. The flags of launch/recommend.py choose
LLM and filters.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.config import run_name
from tca4rec_jax.data.sequences import SPLITS
from tca4rec_jax.decoding.recommender import Recommender
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.explanation.explainer import Explainer
from tca4rec_jax.explanation.page import explanation_page
from tca4rec_jax.explanation.terminal import explanation_lines
from tca4rec_jax.fileio import write_text
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import Count, LocalPath, Natural, NotNegative
from tca4rec_jax.reporting import show, write_results

_ITEMS = flags.DEFINE_multi_string("item", [], "One item of the history; repeat it, oldest first.")
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "The split that --row is of.")
_ROW = DEFINE_field("row", Natural, None, "A row of the split, from 0, instead of --item.")
_K = DEFINE_field("k", Count, 10, "Items in the list.")
_GUIDANCE = DEFINE_field("guidance", NotNegative, 0.0, "Weight of the CF model at inference.")
_CHILDREN = DEFINE_field("children", Count, 3, "The best so many children of a branch are named.")
_COMPARE = flags.DEFINE_multi_string("compare", [], "Two items: why the first stands before.")
_LEAVE_ONE_OUT = flags.DEFINE_bool("leave_one_out", True, "Whether to say what history items add.")
_JSON = DEFINE_field("json", LocalPath, None, "The .json file to write.")
_HTML = DEFINE_field("html", LocalPath, None, "The .html file to write.")
_UNTRAINED = flags.DEFINE_bool("untrained", False, "Use the LLM as it came.")


def explain(config, workdir):
    """Shows why the list after --item, or of a --row, is as it is; writes --json and --html."""
    if len(_COMPARE.value) % 2:
        raise UserError(f"give --compare twice for each pair, got {len(_COMPARE.value)} of them")
    experiment = Experiment(config, workdir)
    name = "" if _UNTRAINED.value else run_name(config)
    history = _history(experiment)
    recommender = Recommender(experiment, name, guidance=_GUIDANCE.value)
    explanation = Explainer(recommender).explain(
        history,
        _K.value,
        children=_CHILDREN.value,
        compare=list(zip(_COMPARE.value[::2], _COMPARE.value[1::2], strict=True)),
        leave_one_out=_LEAVE_ONE_OUT.value,
    )
    show(*explanation_lines(explanation))
    if _JSON.value:
        write_results(Path(_JSON.value), explanation.to_json())
    if _HTML.value:
        write_text(Path(_HTML.value), explanation_page(explanation))


def _history(experiment: Experiment) -> list[str]:
    """--item, or the items before the last one of --row."""
    if bool(_ITEMS.value) == (_ROW.value is not None):
        raise UserError("give either --item (once or more), or --row")
    if _ITEMS.value:
        return _ITEMS.value
    split, item_ids = experiment.data.splits[_SPLIT.value], experiment.data.catalogue.item_ids
    if _ROW.value >= len(split):
        raise UserError(
            f"--row is {_ROW.value}, but {_SPLIT.value} has the rows 0..{len(split) - 1}"
        )
    *before, target = split[_ROW.value].tolist()
    show(f"What came next: {experiment.data.catalogue.titles[target]}")
    return [item_ids[item] for item in before]


if __name__ == "__main__":
    launch(
        explain,
        "explain",
        reads=lambda _: ["data", "cf", "llm", *([] if _UNTRAINED.value else ["run"])],
        writes=[_JSON, _HTML],
        config_of="run",
    )
