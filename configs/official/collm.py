"""CoLLM (arXiv 2310.19488) as published: Yes or No, in two stages.

    C=configs/official/collm.py W=runs/official_collm
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=configs/official/tallrec.py:run=text --workdir=$W \\
      --config.training.rows=0 --config.training.steps=20000
    python launch/train.py --config=$C:run=vectors --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W --runs=vectors

One GPU; not run yet. configs/recommenders/collm.py without TCA: plain next-token prediction over
the vocabulary. Adapters on the text first (the run `text`), then these are held and the projector,
ten times the CF vectors' width, is trained. Where this differs from the original: Llama-2-7B
instead of Vicuna-7B, MovieLens-100K instead of MovieLens-1M and Amazon books, and the words are
ours.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of
from tca4rec_jax.official import answers_of_movies

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "collm.py"


def get_config(arg=""):
    config = config_of(RECOMMENDER)
    answers_of_movies(config)
    config.training.steps = 20_000
    return apply_argument(config, arg)
