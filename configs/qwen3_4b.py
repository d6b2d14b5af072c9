"""Qwen3-4B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download Qwen/Qwen3-4B --local-dir=models/Qwen3-4B
    C=configs/qwen3_4b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/qwen3_4b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1      7.56    24.86   32.43 of 72.8       0.0     293.4         -
    :chips=16  v5e-16   16 x 1 x 1     7.56     1.42    9.02 of 15.8       0.2      44.6     109.9
    :chips=256 v5e-256  256 x 1 x 1    7.56     1.42    9.02 of 15.8       0.2      44.6     109.9
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Qwen3-4B", arg, tensor={1: 1, 16: 1, 256: 1})
