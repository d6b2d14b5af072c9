"""Ranks with one LLM run at several weights of the CF model (guidance, lambda); table and picture.

    python launch/sweep_guidance.py --workdir=runs/quickstart --run=aligned \\
        --guidances=0,0.25,0.5,1,2,4,100

Needs what launch/evaluate.py needs of that run. Writes WORKDIR/sweep_<run>.json, .md and .png.
"""

from absl import flags

from tca4rec_jax.config import run_name
from tca4rec_jax.evaluation.evaluate import sweep_guidance
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import NotNegative

_GUIDANCES = DEFINE_field(
    "guidances", tuple[NotNegative, ...], "0,0.25,0.5,1,2,4,100", "Values of lambda."
)
_UNTRAINED = flags.DEFINE_bool("untrained", False, "Use the pretrained LLM.")


def sweep(config, workdir):
    """Ranks with the run of the config at every weight of --guidances."""
    name = "" if _UNTRAINED.value else run_name(config)
    sweep_guidance(config, workdir, name, _GUIDANCES.value)


if __name__ == "__main__":
    launch(
        sweep,
        "sweep_guidance",
        run_on="all_processes",
        reads=["data", "cf", "cf_logits", "llm", "run"],
        writes=["reports"],
        config_of="run",
    )
