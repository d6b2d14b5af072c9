"""Llama-3.2-1B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download meta-llama/Llama-3.2-1B --local-dir=models/Llama-3.2-1B
    C=configs/llama_3_2_1b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/llama_3_2_1b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1      2.32     7.14    9.46 of 72.8       0.0      91.0         -
    :chips=16  v5e-16   16 x 1 x 1     2.32     0.41    2.78 of 15.8       0.1      12.0      32.5
    :chips=256 v5e-256  256 x 1 x 1    2.32     0.41    2.78 of 15.8       0.1      12.0      32.5
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Llama-3.2-1B", arg, tensor={1: 1, 16: 1, 256: 1})
