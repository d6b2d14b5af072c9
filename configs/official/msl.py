"""MSL (arXiv 2504.04178) as published, on data in the published layout.

    C=configs/official/msl.py:data.path=data/Toys_and_Games W=runs/official_msl
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

One GPU; not run yet. configs/recommenders/msl.py with the published data, LLM (Llama-3.2-3B,
without 8-bit weights), prompt form and schedule: 10 epochs of 10,000 rows, batches of 128, 1e-4 on
a line, 20 steps of warm-up. The lists are its authors' later ones: masked before the softmax, the
sums of beam search divided by the length.
`:objective.temperature=fixed,tau=4.5,objective.scale_by_tau=false` is their fixed tau. The words of
the prompt are ours; tau follows the batches before the one that it scales (docs/method.md).
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of
from tca4rec_jax.official import amazon_titles

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "msl.py"


def get_config(arg=""):
    config = config_of(RECOMMENDER)
    amazon_titles(config)
    config.prompt.target = "{title}"
    config.objective.alpha = 0.0
    config.training.update(batch_size=128, steps=10 * 10_000 // 128)
    config.decoding.update(rules="huggingface", length_penalty=1.0)
    return apply_argument(config, arg)
