"""MovieLens-100K and SmolLM2-135M for most of an epoch: 850 steps of 4-5 s on two CPU cores.

    python launch/train.py --config=configs/movielens_long.py:run=aligned --workdir=runs/long
    python launch/evaluate.py --config=configs/movielens_long.py --workdir=runs/long

after prepare_data.py and train_cf.py with the same config and workdir.
"""

from tca4rec_jax.config import apply_argument, movielens_config


def get_config(arg=""):
    config = movielens_config()
    config.optimizer.learning_rate = 1e-3
    config.training.batch_size = 4
    config.training.steps = 850
    config.evaluation.variants = (
        ("LLM, untrained", "", 0.0),
        ("LLM, alpha > 0", "aligned", 0.0),
        ("LLM, alpha > 0, guided", "aligned", 1.0),
    )
    config.evaluation.differences = (
        ("LLM, alpha > 0", "Most popular"),
        ("LLM, alpha > 0", "LLM, untrained"),
        ("LLM, alpha > 0, guided", "LLM, alpha > 0"),
        ("LLM, alpha > 0, guided", "CF model"),
    )
    return apply_argument(config, arg)
