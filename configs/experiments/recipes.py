"""CF vectors beside titles: do LLaRA and the published features beat the plain prompt?

    G=configs/experiments/recipes.py W=runs/recipes
    python launch/experiments.py --grid=$G --workdir=$W

The quickstart's data, adapters and loss for all three, with and without the alignment; each has its
own prompts and projector. A row's last title is its target: where vectors stand behind titles the
others cannot be. Prompts of 128 tokens hold some ten titles, as LLaRA's do.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender

SHARED = {
    "lora.first_layer": 20,
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "lora.dropout": 0.0,
    "lora.targets": "(q|k|v|o|gate|up|down)_proj",
    "objective.softmax": "children",
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 10,
    "prompt.max_tokens": 128,
    "training.targets": "last",
    "training.batch_size": 8,
    "training.steps": 250,
    "training.buckets": (128,),
    "training.checkpoint_every": 50,
    "decoding.mask": "before_softmax",
    "inference.batch_size": 64,
    "inference.buckets": 3,
}


def get_grid(arg=""):
    return Grid(
        data={"movielens": Data("../quickstart.py")},
        cf={"sasrec": CFModel({"cf.model": "sasrec"})},
        recommenders={
            "titles": Recommender("../quickstart.py", SHARED),
            "llara": Recommender("../recommenders/llara.py", SHARED),
            "features": Recommender("../recommenders/tca_features.py", SHARED),
        },
        axes={"alpha": (0.0, 0.9), "seed": (0,)},
    ).with_argument(arg)
