"""MSL (arXiv 2504.04178) on MovieLens-100K with SmolLM2-135M: softmax over the trie's children.

    C=configs/recommenders/msl.py W=runs/msl
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned,alpha=0.1 --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. tau adapts, starts at 1.5 and scales the loss, whose mean is over the
decisions, as published; `:objective.temperature=fixed,tau=4.5` is the fixed tau of the authors'
later recommendation. Where this differs from the original: SmolLM2 and MovieLens, 250 steps of 16
rows instead of 10 epochs of 10,000, LoRA without 8-bit weights, and tau follows the batches before
the one whose loss it scales (docs/method.md).
"""

from tca4rec_jax.config import apply_argument, movielens_config


def get_config(arg=""):
    config = movielens_config()
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|v)_proj")
    config.objective.update(alpha=0.1, softmax="children", tau=1.5, temperature="adaptive")
    config.objective.update(mean_over="decisions", scale_by_tau=True)
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.decoding.update(mask="before_softmax", beams=10)
    return apply_argument(config, arg)
