"""Qwen2.5-1.5B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download Qwen/Qwen2.5-1.5B --local-dir=models/Qwen2.5-1.5B
    C=configs/qwen2_5_1_5b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/qwen2_5_1_5b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1      2.90    11.21   14.11 of 72.8       0.0     109.9         -
    :chips=16  v5e-16   16 x 1 x 1     2.90     0.68    3.62 of 15.8       0.1      16.2      40.1
    :chips=256 v5e-256  256 x 1 x 1    2.90     0.68    3.62 of 15.8       0.1      16.2      40.1
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Qwen2.5-1.5B", arg, tensor={1: 1, 16: 1, 256: 1})
