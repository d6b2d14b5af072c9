"""TCA4Rec (arXiv 2601.18457) as its published code runs it, with all of its quirks.

    C=configs/official/tca4rec.py:dataset=Office_Products,msl=true,alpha=0.1 W=runs/official
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

The argument takes `dataset` (Toys_and_Games by default), `llm` (a key of LLMS in
tca4rec_jax/official.py), `msl` (the masked softmax, with tau 4.5), `features` (CF vectors in the
prompt) and `rows` (those that were shipped, or made of the downloaded files) besides the usual
fields; docs/official.md lists what differs from our defaults, and why. A bfloat16 LLM on one GPU;
not run to its end yet.
"""

from tca4rec_jax.config import apply_argument, default_config, own_setting
from tca4rec_jax.official import DOMAINS, LLMS, downloaded_rows, official


def get_config(arg=""):
    dataset, arg = own_setting(arg, "dataset", [*DOMAINS])
    llm, arg = own_setting(arg, "llm", [*LLMS])
    msl, arg = own_setting(arg, "msl", ("false", "true"))
    rows, arg = own_setting(arg, "rows", ("shipped", "downloaded"))
    features, arg = own_setting(arg, "features", ("false", "true"))
    config = default_config()
    official(config, dataset, llm, masked=msl == "true", features=features == "true")
    if rows == "downloaded":
        downloaded_rows(config, dataset)
    return apply_argument(config, arg)
