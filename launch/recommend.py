"""Recommends items: after one history, or for a file of histories; or scores given items.

    python launch/recommend.py --workdir=runs/quickstart --run=aligned \\
        --item="Toy Story (1995)" --item="Fargo (1996)"
    python launch/recommend.py ... --input=histories.jsonl --output=recommended.jsonl
    python launch/recommend.py ... --item=100 --item=127 --candidate="Heat (1995)" --candidate=98

Items are ids or titles, oldest first. A file is .jsonl ({"history": [...]}), .csv (a column
`history`, items separated by '|') or .parquet (such a column, or one of lists). Reads WORKDIR/data,
the run in WORKDIR/llm and, with --guidance, the CF model in WORKDIR/cf. Writes --output, if that is
given: .jsonl or .parquet. Interrupted, the same command goes on, and several processes share the
work (--coordinator, --process_count, --process_index). --run names the LLM run below WORKDIR/llm,
whose config is taken where there is no --config; --untrained takes the LLM as it came. --candidate
ranks the items that it names by their scores, of the whole catalogue; of a recommender that answers
Yes or No these are log P(yes) - log P(no), and items of the history are liked but for those that
--disliked names. Filters: --config.decoding.allow=, deny= (files of item ids),
exclude_history=true.
"""

import numpy as np
from absl import flags

from tca4rec_jax.config import run_name
from tca4rec_jax.data.templates import reads_users
from tca4rec_jax.decoding.recommend_file import recommend_file
from tca4rec_jax.decoding.recommender import Recommended, Recommender
from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import Count, LocalPath, NotNegative
from tca4rec_jax.reporting import show

_ITEMS = flags.DEFINE_multi_string("item", [], "One item of the history; repeat it, oldest first.")
_CANDIDATE = flags.DEFINE_multi_string("candidate", [], "An item to score; repeat it.")
_DISLIKED = flags.DEFINE_multi_string("disliked", [], "An --item that the user dislikes.")
_INPUT = DEFINE_field("input", LocalPath, None, "A .jsonl, .csv or .parquet file of histories.")
_OUTPUT = DEFINE_field("output", LocalPath, None, "The .jsonl or .parquet file to write.")
_K = DEFINE_field("k", Count, 10, "Items in a list.")
_GUIDANCE = DEFINE_field("guidance", NotNegative, 0.0, "Weight of the CF model at inference.")
_UNTRAINED = flags.DEFINE_bool("untrained", False, "Use the LLM as it came.")


def recommend(config, workdir):
    """Prints the list after the history --item, or of --candidate; or writes those of --input."""
    if bool(_ITEMS.value) == bool(_INPUT.value) or bool(_INPUT.value) != bool(_OUTPUT.value):
        raise UserError("give either --item (once or more), or --input and --output")
    if (_INPUT.value and _CANDIDATE.value) or (_DISLIKED.value and not _CANDIDATE.value):
        raise UserError("--candidate goes with --item, --disliked with --candidate")
    name = "" if _UNTRAINED.value else run_name(config)
    recommender = Recommender(Experiment(config, workdir), name, guidance=_GUIDANCE.value)
    if _INPUT.value:
        recommend_file(recommender, _INPUT.value, _OUTPUT.value, k=_K.value)
        return
    if _CANDIDATE.value:
        found = scored(recommender)
    else:
        found = recommender.recommend(_ITEMS.value, _K.value)
    for place, one in enumerate(found if is_main_process() else (), start=1):
        show(f"{place:3d}  {one.score:9.4f}  {one.item_id}  {one.title}")


def scored(recommender):
    """The items --candidate after the history --item, best first."""
    catalogue, disliked = recommender.experiment.data.catalogue, {*_DISLIKED.value}

    def named(names, flag):
        items = recommender.find(names, flag).tolist()
        return [(catalogue.item_ids[item], catalogue.titles[item]) for item in items]

    history = named(_ITEMS.value, "--item")  # of which a title names the item that is there
    if others := sorted(disliked.difference(*history)):
        named(others, "--disliked")
        raise UserError(f"--disliked={others[0]!r} names an item that no --item names")
    liked = [disliked.isdisjoint(names) for names in history] if disliked else None
    scores = recommender.score(_ITEMS.value, _CANDIDATE.value, liked=liked)
    names = named(_CANDIDATE.value, "--candidate")
    return [Recommended(*names[at], float(scores[at])) for at in np.argsort(-scores, kind="stable")]


def reads(config):
    """The CF model, the run and the file where they are used."""
    cf = ["cf"] if _GUIDANCE.value or reads_users(config.prompt) else []
    return ["data", *cf, "llm", *([] if _UNTRAINED.value else ["run"]), _INPUT]


if __name__ == "__main__":
    launch(
        recommend,
        "recommend",
        run_on="all_processes",
        reads=reads,
        writes=[_OUTPUT],
        config_of="run",
    )
