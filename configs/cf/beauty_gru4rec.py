"""GRU4Rec on Amazon Beauty, leave one out, with the cross-entropy over all items.

    C=configs/cf/beauty_gru4rec.py:data.interactions=Beauty.inter.json W=runs/beauty_gru4rec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W      # --config.cf.seed=1 for another seed

Two CPU cores; an epoch with its validation takes 17 CPU seconds. One seed, best after 35 epochs:
test NDCG@10 0.0338, HR@10 0.0614 over all 12,101 items.
"""

from tca4rec_jax.config import apply_argument, beauty_config


def get_config(arg=""):
    config = beauty_config()
    config.cf.model = "gru4rec"
    config.cf.max_epochs = 60
    config.cf.gru4rec.update(loss="softmax", targets="rows", dropout=0.5)
    return apply_argument(config, arg)
