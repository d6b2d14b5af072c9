"""Compares models of one or several evaluations on the same rows: paired differences, with tests.

    python launch/compare.py --results=runs/quickstart --baseline="CF model"
    python launch/compare.py --results=runs/a,runs/b/results/guided --model="LLM, alpha > 0" \\
        --output=runs/a_and_b

--results are work directories, or folders results/NAME in them, that launch/evaluate.py wrote;
tables whose rows, candidates, filters or titles differ are refused, with what differs. Each model
is compared to the baseline. Nothing is loaded but ranks. With --output writes comparison.json and
comparison.md.
"""

import sys
from pathlib import Path

from absl import app, flags

from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.compare import compare_results
from tca4rec_jax.ranges import Count, Seed, check
from tca4rec_jax.reporting import show

_RESULTS = flags.DEFINE_list("results", None, "Folders of evaluations.", required=True)
_MODELS = flags.DEFINE_multi_string("model", [], "A label, given for each; by default all.")
_BASELINE = flags.DEFINE_string("baseline", "", "What the others are compared to; the first.")
_CUTOFFS = flags.DEFINE_multi_integer("cutoff", [], "K of HR and NDCG; by default the largest.")
_HITS = flags.DEFINE_enum("hits", "item", ["item", "title"], "What a hit is.")
_SEED = flags.DEFINE_integer("seed", 0, "Of intervals and tests.")
_OUTPUT = flags.DEFINE_string("output", "", "The folder of comparison.json and comparison.md.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        check("--seed", _SEED.value, Seed)
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
    except (OSError, UserError) as error:
        show(f"compare: {error}", error=True)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
