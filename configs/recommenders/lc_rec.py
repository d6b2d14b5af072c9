"""SmolLM2-135M on semantic ids (after LC-Rec, arXiv 2311.09049), on MovieLens-100K.

    C=configs/recommenders/lc_rec.py W=runs/lc_rec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/embed_items.py --config=$C --workdir=$W
    python launch/make_ids.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. Adapters of rank 8 and the rows of the ids' tokens are trained; a first
run with lora.train=false and training.start_from in the second one train the rows first. Where this
differs from the original: SmolLM2 and MovieLens instead of a 7B LLaMA and Amazon, three tasks of
six (the next item, the id of a title, the title of an id), batches of 16, and beams that are kept
to the trie.
"""

from tca4rec_jax.config import apply_argument, movielens_config


def get_config(arg=""):
    config = movielens_config()
    text = "Movies one person watched, in order: {history}. The next one: {target}"
    config.prompt.update(templates=(text,), item="{id}", separator=", ", end="\n")
    config.lora.update(rank=8, alpha=32.0, dropout=0.05, targets="(q|k|v|o|gate|up|down)_proj")
    config.objective.update(alpha=0.1, softmax="vocabulary", form="cross_entropy")
    config.training.tasks = ("Movie: {title}\nId: {id}\n", "Id: {id}\nMovie: {title}\n")
    config.training.update(targets="last", batch_size=16, steps=500, buckets=())
    config.decoding.beams = 20
    return apply_argument(config, arg)
