"""Titles, or semantic ids of our own: which is generated better after as long a training?

    C=configs/quickstart.py:data.source=published,data.path=Office_Products V=runs/rq_vae
    python launch/prepare_data.py --config=$C --workdir=$V
    python launch/embed_items.py --config=$C --workdir=$V
    python launch/make_ids.py --config=$C,ids.method=rq_vae --workdir=$V
    G=configs/experiments/own_ids.py:office.data.path=Office_Products W=runs/own_ids
    python launch/experiments.py --grid=$G --workdir=$W
    python launch/experiments_report.py --grid=$G --workdir=$W --output=results.md

SmolLM2-135M writes titles, a decoder from scratch ids. The steps of both take 17 minutes on a slow
core, embedding titles for the ids not counted. The grid makes the ids of RQ-k-means; those of
RQ-VAE have to be there.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender

OFFICE = {
    "cf.sasrec.loss": "softmax",
    "cf.sasrec.targets": "all",
    "cf.sasrec.dropout": 0.3,
    "evaluation.rows": 1000,
}
TITLES = {
    "prompt.templates": ("Products one person bought, in order:\n{history}\n{target}",),
    "training.batch_size": 4,
    "training.cache_hidden_states": False,
    "training.buckets": (),
    "training.steps": 250,
}
IDS = {  # ten items of a history and the target, with room for ids of four tokens
    "objective.beta": 1.0,
    "ids.codes": (256, 256, 256),
    "prompt.max_tokens": 1 + 4 * 11,
    "training.buckets": (),
    "training.batch_size": 64,
    "training.steps": 1750,
    "optimizer.warmup_steps": 30,
}
DECODER = "../recommenders/tiger_decoder.py"


def get_grid(arg=""):
    return Grid(
        data={"office": Data("../cf/sasrec_published.py", OFFICE)},
        cf={"sasrec": CFModel({"cf.model": "sasrec"})},
        recommenders={
            "titles": Recommender("../quickstart.py", TITLES),
            "rq_k_means": Recommender(DECODER, IDS),
            "rq_vae": Recommender(DECODER, IDS | {"ids.path": "runs/rq_vae/ids/ids.json"}),
        },
        axes={"alpha": (0.0, 0.9), "seed": (0,)},
    ).with_argument(arg)
