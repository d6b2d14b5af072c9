"""LLaRA (arXiv 2312.02445) on MovieLens-100K with SmolLM2-135M: a CF vector after every title.

    C=configs/recommenders/llara.py W=runs/llara
    python launch/prepare_data.py --config=$C --workdir=$W
    python launch/train_cf.py --config=$C --workdir=$W
    python launch/train.py --config=$C:run=plain,alpha=0 --workdir=$W
    python launch/train.py --config=$C:run=aligned,alpha=0.1 --workdir=$W
    python launch/evaluate.py --config=$C --workdir=$W

Two CPU cores; not run yet. As published: the vectors are SASRec's, the projector has two layers of
the LLM's width with a GELU between them and a weight decay of its own, the curriculum goes from
texts to vectors, one of three prompts is drawn for every row, LoRA of rank 8 and alpha 32 is in all
seven projections, the learning rate is 8e-4 with 5% of warm-up and a cosine. Where this differs
from the original: SmolLM2-135M instead of Llama-2-7B, 250 steps of 16 rows instead of 5 epochs of
batches of 128, a template drawn per row and not per batch, a weight decay of 0.01 for the adapters;
and the whole catalogue is ranked by beams, where the original writes one of 20 candidates that its
prompt lists: `{candidates}` in the templates, prompt.candidates and evaluation.candidates do that.

Llama-3.2-3B is `--config=configs/llama_3_2_3b.py:chips=16` with the fields `prompt.item`,
`projector.curriculum` and `lora` of this file: it fits a v5e-16 and an h100-8 (docs/scaling.md).
"""

from tca4rec_jax.config import apply_argument, movielens_config

TEMPLATES = (
    "Movies one person watched, in order:{history}\nThe next one:{target}",
    "A viewer has seen these movies, the latest last:{history}\nThen this viewer watched:{target}",
    "Watched so far:{history}\nThe movie to recommend next:{target}",
)


def get_config(arg=""):
    config = movielens_config()
    config.prompt.update(templates=TEMPLATES, item=" {title}{vector}", separator=",")
    config.projector.curriculum = True
    config.lora.update(rank=8, alpha=32.0, dropout=0.1)
    config.objective.update(alpha=0.1, softmax="vocabulary", form="cross_entropy")
    config.optimizer.update(learning_rate=8e-4, warmup_steps=12, schedule="cosine")
    config.training.update(targets="last", batch_size=16, steps=250, buckets=())
    config.decoding.update(mask="after_softmax", beams=10)
    return apply_argument(config, arg)
