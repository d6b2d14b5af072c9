"""CoLLM (arXiv 2310.19488) on MovieLens-100K with SmolLM2-135M: Yes or No, with CF vectors.

    C=configs/recommenders/collm.py W=runs/collm
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=configs/recommenders/tallrec_yes_no.py:alpha=0,run=text \\
      --workdir=$W --config.training.rows=0 --config.training.steps=250
    python launch/train.py --config=$C:alpha=0,run=plain --workdir=$W
    python launch/train.py --config=$C:alpha=0.3,run=aligned --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W --runs=plain,aligned

Two CPU cores; not run yet. Two stages, as published: first adapters on the text alone (the run
`text`), then these are held and a projector is trained, which brings the user's CF vector and the
movie's into the prompt. Where this differs from the original: SmolLM2-135M instead of Vicuna-7B,
BPR-MF trained on the rows that the LLM is trained on, the liked titles alone in the history,
another split, and the CF model may regulate the loss as well.
"""

from tca4rec_jax.config import apply_argument, movielens_config

QUESTION = (
    "A user whose features are {user} liked these movies:{liked}\nWill the user like{item}, whose "
    "features are {vector}? Answer Yes or No.\nAnswer:{target}"
)


def get_config(arg=""):
    config = movielens_config()
    config.data.update(rating_column="rating", liked_above=3.0)
    config.cf.model = "bpr_mf"
    config.recommender.name = "answer"
    config.prompt.update(templates=(QUESTION,), item=' "{title}"', separator=",", target="{title}")
    config.prompt.max_tokens = 256
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|v)_proj", train=False)
    config.projector.update(width=640, activation="relu")  # ten times the CF vectors' width
    config.objective.update(alpha=0.3, softmax="children", form="cross_entropy")
    config.optimizer.update(learning_rate=1e-3, warmup_steps=10)
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.training.start_from = "text"
    config.evaluation.rows = 1000
    return apply_argument(config, arg)
