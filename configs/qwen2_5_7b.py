"""Qwen2.5-7B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download Qwen/Qwen2.5-7B --local-dir=models/Qwen2.5-7B
    C=configs/qwen2_5_7b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/qwen2_5_7b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1     14.24    24.39   38.64 of 72.8       0.0     368.8         -
    :chips=16  v5e-16   8 x 1 x 2      7.15     1.49    8.67 of 15.8       5.4      75.8     119.2
    :chips=256 v5e-256  128 x 1 x 2    7.15     0.74    7.92 of 15.8       2.8      37.1      66.8
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Qwen2.5-7B", arg, tensor={1: 1, 16: 2, 256: 2})
