"""TALLRec (arXiv 2305.00447) on MovieLens-100K with SmolLM2-135M: will the user like a movie?

    C=configs/recommenders/tallrec_yes_no.py W=runs/tallrec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    for seed in 0 1 2; do
      python launch/train.py --config=$C:alpha=0,seed=$seed,run=plain_$seed --workdir=$W
      python launch/train.py --config=$C:alpha=0.3,seed=$seed,run=aligned_$seed --workdir=$W
    done
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. `training.rows=16`, 64 or 256 are the published few-shot settings; each
seed samples other rows. A movie is liked above 3 stars; AUC and UAUC are over every answer of
evaluation.rows rows. Where this differs from the original: SmolLM2-135M instead of LLaMA-7B,
batches of 16 rows for 100 steps instead of 128 for 200 epochs, the chronological split of this
project, a history of 10 movies of which the latest that fit are shown; the loss is over the two
answers (`:softmax=vocabulary` is the published one), and the CF model may regulate it.
"""

from tca4rec_jax.config import apply_argument, movielens_config

QUESTION = (
    "Given the user's preferences, say whether the user will like the target movie by answering "
    "Yes or No.\nUser preference:{liked}\nUser unpreference:{disliked}\nWhether the user will like "
    "the target movie{item}?\nAnswer:{target}"
)


def get_config(arg=""):
    config = movielens_config()
    config.data.update(rating_column="rating", liked_above=3.0)
    config.recommender.name = "answer"
    config.prompt.update(templates=(QUESTION,), item=' "{title}"', separator=",", target="{title}")
    config.prompt.max_tokens = 256
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|v)_proj")
    config.objective.update(alpha=0.3, softmax="children", form="cross_entropy")
    config.optimizer.update(learning_rate=1e-3, warmup_steps=10)
    config.training.update(targets="last", rows=256, batch_size=16, steps=100, buckets=())
    config.evaluation.rows = 1000
    return apply_argument(config, arg)
