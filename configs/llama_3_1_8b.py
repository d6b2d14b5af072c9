"""Llama-3.1-8B with LoRA on a published data set: the settings of docs/method.md, bfloat16.

    hf download meta-llama/Llama-3.1-8B --local-dir=models/Llama-3.1-8B
    C=configs/llama_3_1_8b.py:chips=16,data.path=data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/llama_3_1_8b
    done

The training step of one device by compile_ahead (docs/scaling.md): data x fsdp x tensor, GiB, ms:

    argument   target   mesh         weights temporary   total         links  at least  compiler
    :chips=1   h100-1   1 x 1 x 1     15.04    25.14   40.17 of 72.8       0.0     408.7         -
    :chips=16  v5e-16   8 x 1 x 2      7.56     1.52    9.13 of 15.8       7.1      82.4     138.9
    :chips=16  h100-8   4 x 1 x 2      7.56     3.78   11.34 of 72.8       7.3      65.5         -
    :chips=256 v5e-256  128 x 1 x 2    7.56     0.75    8.35 of 15.8       3.7      40.1      77.4
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("Llama-3.1-8B", arg, tensor={1: 1, 16: 2, 256: 2})
