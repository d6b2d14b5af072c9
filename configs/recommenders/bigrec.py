"""BIGRec (arXiv 2308.08434) on MovieLens-100K with SmolLM2-135M: an instruction, titles in quotes.

    C=configs/recommenders/bigrec.py W=runs/bigrec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned,alpha=0.1 --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. As published: LoRA of rank 8 and alpha 16 with dropout 0.05 on the
queries and values, plain next-token prediction of the answer. Its learning rate is 1e-4 over 50
epochs of 1,024 rows in batches of 128; here 1e-3 over 250 steps of 16 rows, since a run on two
cores is that short. Lists are beams over the trie of the titles, scored by the probabilities of the
whole vocabulary; `:decoding.find=grounding` generates freely and ranks the titles by their distance
to what was written, as published. With another LLM give the end of its answers in prompt.end.
"""

from tca4rec_jax.config import apply_argument, movielens_config

INSTRUCTION = (
    "Recommend one movie to a person who has watched these, the latest last.\n"
    "Watched: {history}\nNext: {target}"
)


def get_config(arg=""):
    config = movielens_config()
    config.prompt.update(templates=(INSTRUCTION,), item='"{title}"', separator=", ")
    config.prompt.update(end="<|im_end|>", max_tokens=256)
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|v)_proj")
    config.objective.update(alpha=0.1, softmax="vocabulary", form="log_expectation")
    config.optimizer.learning_rate = 1e-3
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.decoding.update(mask="after_softmax", beams=10)
    return apply_argument(config, arg)
