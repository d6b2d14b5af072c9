"""SASRec as the published code trains it, on a data set in the published layout.

    C=configs/cf/sasrec_published.py:data.path=data/Office_Products W=runs/office
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W

The last item of each row alone is supervised, by binary cross-entropy with one uniform negative
outside the history; 64 units, 2 blocks, 1 head, dropout 0.5, Adam 1e-3, batches of 256, up to 201
epochs, patience 10 on validation NDCG@10. Ranking leaves no item out and there is no item 0.
"""

from tca4rec_jax.config import apply_argument, default_config, published_cf


def get_config(arg=""):
    config = default_config()
    published_cf(config)
    return apply_argument(config, arg)
