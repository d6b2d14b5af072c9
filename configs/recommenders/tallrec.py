"""TALLRec's instruction (arXiv 2305.00447) with the next title as the answer, on MovieLens-100K
with SmolLM2-135M.

    C=configs/recommenders/tallrec.py W=runs/tallrec
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned,alpha=0.1 --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. The answer is a title, as in the TCA paper, not Yes or No, and stands in
the chat of the LLM (prompt.chat). As published: LoRA of rank 8 and alpha 16 with dropout 0.05 on
the queries and values. Its learning rate is 1e-4 over 200 epochs of 16 to 256 rows in batches of
128; here 1e-3 over 250 steps of 16 of all rows. Histories have no ratings: all items of one count
as liked. With another LLM give the end of its answers in prompt.end.
"""

from tca4rec_jax.config import apply_argument, movielens_config

INSTRUCTION = (
    "### Task\nHere is what a person liked to watch, in order. Answer with the title of the movie "
    "that this person will watch next.\n### Liked\n{history}\n### Answer\n{target}"
)


def get_config(arg=""):
    config = movielens_config()
    config.prompt.update(templates=(INSTRUCTION,), item="{title}", chat=True, end="<|im_end|>")
    config.lora.update(rank=8, alpha=16.0, dropout=0.05, targets="(q|v)_proj")
    config.objective.update(alpha=0.1, softmax="vocabulary", form="log_expectation")
    config.optimizer.learning_rate = 1e-3
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.decoding.update(mask="after_softmax", beams=10)
    return apply_argument(config, arg)
