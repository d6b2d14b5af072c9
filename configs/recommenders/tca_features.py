"""The "features" of the published TCA4Rec on MovieLens-100K with SmolLM2-135M.

    C=configs/recommenders/tca_features.py W=runs/tca_features
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned,alpha=0.1 --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. As published: SASRec's vector of the user in front of the history and
one of an item after each title, through a projector 64 -> 320 -> the LLM's width with a ReLU. Where
this differs from the original: SmolLM2 and MovieLens, 250 steps of 16 rows, and the projector is
trained, which the published code leaves as it began (`:projector.train=false` does that too).

Here adapters and projector are trained together. In two stages, as CoLLM trains them, first the
adapters alone, on texts alone, then the projector alone:

    python launch/train.py --config=$C:run=texts,alpha=0 --workdir=$W \\
      --config.prompt.item=" {title}" --config.prompt.templates="('{history}\\n{target}',)"
    python launch/train.py --config=$C:run=second --workdir=$W \\
      --config.training.start_from=texts --config.lora.train=false
"""

from tca4rec_jax.config import apply_argument, movielens_config

TEMPLATE = "A person{user} watched these movies, in order:\n{history}\n{target}"


def get_config(arg=""):
    config = movielens_config()
    config.prompt.update(templates=(TEMPLATE,), item=" {title}{vector}")
    config.projector.update(width=320, activation="relu")
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|k|v|o)_proj")
    config.objective.update(alpha=0.1, softmax="vocabulary", form="cross_entropy")
    config.optimizer.learning_rate = 1e-3
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.decoding.update(mask="after_softmax", beams=10)
    return apply_argument(config, arg)
