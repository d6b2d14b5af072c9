"""TALLRec (arXiv 2305.00447) as published, on MovieLens-100K: Yes or No from a few rows.

    C=configs/official/tallrec.py W=runs/official_tallrec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    for seed in 0 1 2; do
      python launch/train.py --config=$C:seed=$seed,run=rows_64_$seed --workdir=$W
    done
    python launch/evaluate.py --config=$C --workdir=$W

One GPU; not run yet. configs/recommenders/tallrec_yes_no.py without TCA and with the published
schedule: 64 rows (`:rows=16` and `:rows=256` are the others) in batches of 128, 200 epochs, 1e-4;
plain next-token prediction over the vocabulary; AUC. Where this differs from the original:
Llama-2-7B instead of the first LLaMA, this project's split, 10 steps of warm-up, the words are
ours.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of, own_setting
from tca4rec_jax.official import answers_of_movies

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "tallrec_yes_no.py"


def get_config(arg=""):
    rows, arg = own_setting(arg, "rows", ("64", "16", "256"))
    config = config_of(RECOMMENDER)
    answers_of_movies(config)
    config.training.update(rows=int(rows), steps=200 * -(-int(rows) // 128))
    return apply_argument(config, arg)
