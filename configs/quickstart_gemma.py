"""The quickstart's rows and steps with a second LLM: MovieLens-100K and Gemma 3 270M.

    export TCA4REC_ACCEPT_TERMS=gemma     # if you accept them: https://ai.google.dev/gemma/terms
    C=configs/quickstart_gemma.py W=runs/quickstart_gemma
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:alpha=0,run=plain --workdir=$W
    python launch/train.py --config=$C:run=aligned --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

On two CPU cores with other work a step took 1.6 s. It reached NDCG@10 0.0281 [0.0192, 0.0374] and
NLL 6.7610 of the title at alpha = 0.9; docs/benchmarks.md has the table beside SmolLM2-135M.
"""

from tca4rec_jax.config import apply_argument, quickstart_config


def get_config(arg=""):
    config = quickstart_config()
    config.llm.weights = "gemma-3-270m"
    config.lora.first_layer = 12  # of 18, as many as the quickstart's 20 of 30
    return apply_argument(config, arg)
