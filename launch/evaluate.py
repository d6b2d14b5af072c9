"""Evaluates CF models and LLM runs on the same rows and writes tables, pictures and a report.

    python launch/evaluate.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch/evaluate.py ... --runs=plain,aligned,untrained --guidance=0,1 --name=guided

Reads what prepare_data, train_cf and train left in WORKDIR; of the LLM runs those of --runs, or of
config.evaluation.variants, or all that are finished. Writes WORKDIR/report.html (all of it in one
file, for a browser), results.json, .md and .png, or with --name the same files in
WORKDIR/results/NAME.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.evaluation.comparison import UNTRAINED, results_folder
from tca4rec_jax.evaluation.evaluate import evaluate_run
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import FolderName, NotNegative

_RUNS = flags.DEFINE_list("runs", [], "LLM runs; 'untrained' is the pretrained LLM.")
_GUIDANCE = DEFINE_field("guidance", tuple[NotNegative, ...], None, "Weights of the CF model.")
_NAME = DEFINE_field("name", FolderName, None, "Of the results; those of that name are replaced.")


def evaluate(config, workdir):
    """Evaluates what the flags or the config say."""
    guidances, name = _GUIDANCE.value or (), _NAME.value or ""
    evaluate_run(config, workdir, runs=_RUNS.value, guidances=guidances, name=name)


def reads(config):
    """The runs of --runs, of the config, or all, and what is read for any of them."""
    runs = _RUNS.value or [run for _, run, _ in config.evaluation.variants]
    folders = [Path("llm", run) for run in runs if run not in ("", UNTRAINED)]
    return ["data", "cf", "cf_logits", "llm", *(folders if runs else [Path("llm")])]


def writes(_):
    """The lists, and the reports by their name."""
    return [Path("evaluation"), results_folder(Path(), _NAME.value or "")]


if __name__ == "__main__":
    launch(
        evaluate,
        "evaluate",
        run_on="all_processes",
        reads=reads,
        writes=writes,
        config_of="any_run",
    )
