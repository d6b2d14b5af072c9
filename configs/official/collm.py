"""CoLLM (arXiv 2310.19488) as published: Yes or No, in two stages.

    C=configs/official/collm.py W=runs/official_collm
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:stage=text --workdir=$W
    python launch/train.py --config=$C:run=vectors --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W --runs=vectors

One GPU; not run yet. configs/recommenders/collm.py without TCA: plain next-token prediction over
the vocabulary. Adapters on the same question without vectors first (the run `text`), then these are
held and the projector, ten times the CF vectors' width, is trained. Where this differs from the
original: the steps and the warm-up are ours, Llama-2-7B instead of Vicuna-7B, MovieLens-100K
instead of MovieLens-1M and Amazon books, and the words are ours.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of, own_setting
from tca4rec_jax.official import answers_of_movies

TEXT = (  # its question without vectors
    "A user liked these movies:{liked}\nWill the user like{item}? Answer Yes or No.\n"
    "Answer:{target}"
)
RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "collm.py"


def get_config(arg=""):
    stage, arg = own_setting(arg, "stage", ("vectors", "text"))
    config = config_of(RECOMMENDER)
    answers_of_movies(config)
    config.training.steps = 20_000
    if stage == "text":
        config.prompt.templates = (TEXT,)
        config.lora.train = True
        config.update(run="text", training={"start_from": None})
    return apply_argument(config, arg)
