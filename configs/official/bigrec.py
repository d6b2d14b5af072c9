"""BIGRec (arXiv 2308.08434) as published, on data in the published layout.

    C=configs/official/bigrec.py:data.path=data/Toys_and_Games W=runs/official_bigrec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

One GPU; not run yet. configs/recommenders/bigrec.py with the published schedule (50 epochs of 1,024
rows, batches of 128, 1e-4) and lists: 4 beams write a title freely, and all titles are ranked by
their distance to it; `--guidance` weighs the CF model's or popularity's part. `:training.rows=0,
llm.train=full,optimizer.learning_rate=3e-4` is its other setting, for a model of 0.5B. Where this
differs from the original: Llama-3.2-3B instead of the first LLaMA-7B, the TCA4Rec data instead of
its MovieLens-10M and games, and the words of the prompt are ours.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of
from tca4rec_jax.official import amazon_titles

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "bigrec.py"


def get_config(arg=""):
    config = config_of(RECOMMENDER)
    amazon_titles(config)
    config.objective.alpha = 0.0
    config.training.update(rows=1024, batch_size=128, steps=50 * 1024 // 128)
    config.decoding.update(find="grounding", grounding_beams=4)
    return apply_argument(config, arg)
