"""Llama-3.2-3B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download meta-llama/Llama-3.2-3B --local-dir=models/Llama-3.2-3B
    C=configs/llama_3_2_3b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/llama_3_2_3b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1      6.04    14.54   20.57 of 72.8       0.0     202.7         -
    :chips=16  v5e-16   16 x 1 x 1     6.04     0.86    6.93 of 15.8       0.2      33.7      74.2
    :chips=16  h100-8   8 x 1 x 1      6.04     1.90    7.94 of 72.8       0.1      32.6         -
    :chips=256 v5e-256  256 x 1 x 1    6.04     0.86    6.93 of 15.8       0.2      33.7      74.2
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Llama-3.2-3B", arg, tensor={1: 1, 16: 1, 256: 1})
