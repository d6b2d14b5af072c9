"""SASRec on Amazon Beauty, leave one out, with the cross-entropy over all items.

    C=configs/cf/beauty_sasrec.py:data.interactions=Beauty.inter.json W=runs/beauty
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W

Not run yet.
"""

from tca4rec_jax.config import apply_argument, beauty_config


def get_config(arg=""):
    config = beauty_config()
    config.cf.sasrec.loss = "softmax"
    return apply_argument(config, arg)
