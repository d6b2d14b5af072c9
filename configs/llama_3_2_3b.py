"""Llama-3.2-3B with LoRA on one of the published data sets: method.md's settings, bfloat16.

    hf download meta-llama/Llama-3.2-3B --local-dir=models/Llama-3.2-3B
    C=configs/llama_3_2_3b.py:chips=16,data.path=../shared/data/Office_Products
    for step in prepare_data train_cf train evaluate; do
      python launch/$step.py --config=$C --workdir=runs/llama_3_2_3b
    done

TABLE
"""

from tca4rec_jax.config import published_config


def get_config(arg=""):
    return published_config("llama-3.2-3b", "Llama-3.2-3B", arg, tensor={1: 1, 16: 1, 256: 1})
