"""Ranks with one LLM run at several weights of the CF model (guidance, lambda); table and picture.

    python launch/sweep_guidance.py --workdir=runs/quickstart --run=aligned \\
        --guidances=0,0.25,0.5,1,2,4,100

Reads what launch/evaluate.py reads of that run. Writes WORKDIR/sweep_<run>.json, .md and .png, or
with --name the same files in WORKDIR/results/NAME.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.config import run_name
from tca4rec_jax.evaluation.comparison import results_folder
from tca4rec_jax.evaluation.evaluate import sweep_guidance
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import FolderName, NotNegative

_GUIDANCES = DEFINE_field(
    "guidances", tuple[NotNegative, ...], "0,0.25,0.5,1,2,4,100", "Values of lambda."
)
_UNTRAINED = flags.DEFINE_bool("untrained", False, "Use the pretrained LLM.")
_NAME = DEFINE_field("name", FolderName, None, "Of the results; those of that name are replaced.")


def sweep(config, workdir):
    """Ranks with the run of the config at every weight of --guidances."""
    run = "" if _UNTRAINED.value else run_name(config)
    sweep_guidance(config, workdir, run, _GUIDANCES.value, name=_NAME.value or "")


def writes(_):
    """The lists, and the reports by their name."""
    return [Path("evaluation"), results_folder(Path(), _NAME.value or "")]


if __name__ == "__main__":
    launch(
        sweep,
        "sweep_guidance",
        run_on="all_processes",
        reads=lambda _: ["data", "cf", "cf_logits", "llm", *([] if _UNTRAINED.value else ["run"])],
        writes=writes,
        config_of="run",
    )
