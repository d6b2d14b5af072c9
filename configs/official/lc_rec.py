"""LC-Rec (arXiv 2311.09049), its LoRA variant, as published, on Amazon Beauty.

    C=configs/official/lc_rec.py W=runs/official_lc_rec
    D=data.interactions=Beauty.inter.json,ids.path=Beauty.index.json
    python launch/prepare_data.py --config=$C:$D --workdir=$W
    python launch/train_cf.py --config=$C:$D --workdir=$W
    python launch/train.py --config=$C:$D --workdir=$W
    python launch/evaluate.py --config=$C:$D --workdir=$W

One GPU; not run yet. configs/recommenders/lc_rec.py without TCA, with the published LLM
(Llama-2-7B) and schedule: rank 8, alpha 32, batches of 64, 1e-4, 4 epochs, 20 beams; leave one out.
Beauty's file has no titles, so the tasks that tie ids to titles are left out: give them with
data.catalogue and training.tasks. Where this differs from the original otherwise: histories of 20,
new rows of the vocabulary instead of whole tables, beams that are kept to the trie.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, beauty_config, config_of

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "lc_rec.py"


def get_config(arg=""):
    config = config_of(RECOMMENDER)
    config.data = beauty_config().data
    config.data.history_length = config.cf.history_length = 20
    config.llm.update(weights="models/Llama-2-7b-hf", dtype="bfloat16")
    text = "Items one person bought, in order: {history}. The next one: {target}"
    config.prompt.update(templates=(text,), bos="added", end="</s>", max_tokens=512)
    config.objective.update(alpha=0.0, form="log_expectation")
    config.training.update(tasks=(), batch_size=64, steps=4 * 131_413 // 64)
    config.training.buckets = (512,)
    config.optimizer.learning_rate = 1e-4
    config.decoding.update(mask="after_softmax", rules="huggingface", exclude_history=False)
    config.decoding.length_penalty = 1.0
    config.evaluation.rows = 0
    return apply_argument(config, arg)
