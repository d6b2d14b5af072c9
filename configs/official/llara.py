"""LLaRA (arXiv 2312.02445) as published, on MovieLens-100K: one of 20 candidates, HR@1.

    C=configs/official/llara.py W=runs/official_llara
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

One GPU; not run yet. configs/recommenders/llara.py with the published LLM (Llama-2-7B), schedule (5
epochs, batches of 128, 8e-4 on a cosine after 5% of warm-up) and protocol: the prompt lists 20
candidates, of which the target is one, and the LLM writes one of them. Where this differs from the
original: the rows are this project's chronological split (published: 95 test rows), a template is
drawn per row, the words are ours, and one beam over the trie of the candidates takes the place of
greedy text. Published HR@1 with the vectors of GRU4Rec, Caser and SASRec: .40, .42 and .45, on 95
rows: within 10 points.
"""

from pathlib import Path

from tca4rec_jax.config import apply_argument, config_of

RECOMMENDER = Path(__file__).parents[1] / "recommenders" / "llara.py"


def get_config(arg=""):
    config = config_of(RECOMMENDER)
    asked = "\nOne of these is next:{candidates}\n"
    texts = (text.replace("\n", asked, 1) for text in config.prompt.templates)
    config.prompt.update(templates=tuple(texts), candidates=20, bos="added", end="</s>")
    config.prompt.max_tokens = 1024
    config.llm.update(weights="models/Llama-2-7b-hf", dtype="bfloat16")
    config.objective.alpha = 0.0
    config.training.update(batch_size=128, steps=5 * 72_456 // 128)
    config.training.buckets = (1024,)
    config.optimizer.warmup_steps = config.training.steps // 20
    config.decoding.beams = 1
    config.evaluation.update(candidates=20, rows=0, cutoffs=(1,))
    return apply_argument(config, arg)
