"""A grid of seconds, to see that all of it works: MovieLens-100K, decoders of one layer on ids.

    python launch/experiments.py --grid=configs/experiments/tiny.py --workdir=runs/tiny_grid

Its numbers mean nothing.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender

DECODER = {
    "llm.random.num_layers": 1,
    "llm.random.hidden_size": 32,
    "llm.random.intermediate_size": 32,
    "llm.random.num_heads": 2,
    "llm.random.num_kv_heads": 2,
    "llm.random.head_dim": 16,
    "ids.codes": (4, 4),
    "training.steps": 6,
    "training.batch_size": 4,
    "objective.beta": 1.0,
    "training.buckets": (),
    "training.checkpoint_every": 2,
    "optimizer.warmup_steps": 1,
    "decoding.beams": 10,
    "inference.batch_size": 16,
    "inference.buckets": 1,
}


def get_grid(arg=""):
    rows = {"evaluation.rows": 32, "validation.rows": 16}
    weak = {"cf.model": "bpr_mf", "cf.bpr_mf.units": 8, "cf.max_epochs": 1}
    return Grid(
        data={"movielens": Data("../quickstart.py", rows)},
        cf={"popularity": CFModel({"cf.model": "popularity"}), "bpr_mf": CFModel(weak)},
        recommenders={
            "ids": Recommender("../recommenders/tiger_decoder.py", DECODER, vectors="bpr_mf")
        },
        axes={"alpha": (0.0, 0.3, 0.9), "seed": (0, 1), "guidance": (0.0, 1.0)},
        chosen=("alpha",),
        choose_seeds=(0,),
    ).with_argument(arg)
