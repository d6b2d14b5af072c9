"""Compares models of one or several evaluations on the same rows: paired differences, with tests.

    python launch/compare.py --results=runs/quickstart --baseline="CF model"
    python launch/compare.py --results=runs/a,runs/b/results/guided --model="LLM, alpha > 0" \\
        --output=runs/a_and_b

Reads the ranks in --results: work directories, or folders results/NAME in them, that
launch/evaluate.py wrote; tables whose rows, candidates, filters or titles differ are refused, with
what differs. Each model is compared to the baseline. Writes comparison.json and comparison.md to
--output, if that is given.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.evaluation.compare import compare_results
from tca4rec_jax.launching import DEFINE_field, launch_alone
from tca4rec_jax.ranges import Count, Seed, check

_RESULTS = flags.DEFINE_list("results", None, "Folders of evaluations.")
_MODELS = flags.DEFINE_multi_string("model", [], "A label, given for each; by default all.")
_BASELINE = flags.DEFINE_string("baseline", "", "What the others are compared to; the first.")
_CUTOFFS = flags.DEFINE_multi_integer("cutoff", [], "K of HR and NDCG; by default the largest.")
_HITS = flags.DEFINE_enum("hits", "item", ["item", "title"], "What a hit is.")
_SEED = DEFINE_field("seed", Seed, 0, "Of intervals and tests.")
_OUTPUT = flags.DEFINE_string("output", "", "The folder of comparison.json and comparison.md.")


def compare():
    """Prints the comparison, and writes it to --output."""
    for k in _CUTOFFS.value:
        check("--cutoff", k, Count)
    compare_results(
        [Path(folder) for folder in _RESULTS.value],
        labels=_MODELS.value,
        baseline=_BASELINE.value,
        cutoffs=_CUTOFFS.value,
        hits=_HITS.value,
        seed=_SEED.value,
        output=Path(_OUTPUT.value) if _OUTPUT.value else None,
    )


if __name__ == "__main__":
    launch_alone(compare, "compare", required=["results"])
