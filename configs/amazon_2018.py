"""The published preprocessing, from the Amazon 2018 files that people download.

    C=configs/amazon_2018.py:data.interactions=Office_Products.json.gz,data.catalogue=meta_Office_Products.json.gz
    python launch/prepare_data.py --config=$C --workdir=runs/office

Of Toys_and_Games and Sports_and_Outdoors the last 48 x 30 days, and items with a brand:

    C="$C,data.filters.last_days=1440,data.attributes=('brand',),data.needed_attributes=('brand',)"

What every step left is logged and kept in WORKDIR/data/statistics.json.
"""

from tca4rec_jax.config import apply_argument, movielens_config, published_rows


def get_config(arg=""):
    config = movielens_config()
    published_rows(config)
    config.prompt.templates = ("Products one person bought, in order:\n{history}\n{target}",)
    config.training.buckets = ()
    return apply_argument(config, arg)
