"""Trains the LLM of a run, with the CF model's logits in its soft labels.

    python launch/train.py --config=configs/quickstart.py:alpha=0.1 --workdir=runs/x

Reads WORKDIR/data (launch/prepare_data.py), the CF logits in WORKDIR/cf (launch/train_cf.py) and
the LLM's weights; goes on from its own last checkpoint. Writes WORKDIR/llm/<run>/: checkpoints,
log.jsonl, config.json.
"""

from tca4rec_jax.experiment import Experiment
from tca4rec_jax.launching import launch
from tca4rec_jax.train import train

if __name__ == "__main__":
    launch(
        lambda config, workdir: train(Experiment(config, workdir)),
        "train",
        run_on="all_processes",
        reads=["data", "cf_logits", "llm"],
        writes=["run"],
    )
