"""Does the alignment help, across data, CF models and recommenders? The main table of the results.

    G=configs/experiments/claim.py:beauty.data.interactions=Beauty.inter.json
    G=$G,ids.on.beauty.ids.path=Beauty.index.json,office.data.path=Office_Products
    python launch/experiments.py --grid=$G --workdir=runs/claim --dry_run
    python launch/experiments.py --grid=$G,data=movielens,seed=0 --workdir=runs/claim --minutes=120

alpha and guidance are chosen on validation rows with the first seed; test rows are ranked with
these and with alpha = 0. SmolLM2-135M, or a decoder from scratch on semantic ids; Beauty has no
titles. In hours of one core, on movielens titles 7 and llara 9 (estimated), ids 3; on beauty ids 3
(a run and its rankings take 7 minutes); office as movielens. Most of it is ranking 2,000 test rows
by SmolLM2, 0.3 s each. Not counted are the validations of every tenth of a training, for its speed.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender

ROWS = {"evaluation.rows": 2000, "validation.rows": 300}
SOFTMAX = {"cf.sasrec.loss": "softmax", "cf.sasrec.targets": "all", "cf.sasrec.dropout": 0.3}
PRODUCTS = {"prompt.templates": ("Products one person bought, in order:\n{history}\n{target}",)}
VALIDATED = {"validation.every": 25, "validation.beams": 1}  # ten times, for the NLL alone
QUICK = VALIDATED | {  # 20 of 30 layers as they are, the loss of the others, a quarter of its batch
    "lora.first_layer": 20,
    "objective.softmax": "children",
    "decoding.mask": "before_softmax",
    "training.batch_size": 4,
    "training.checkpoint_every": 50,
    "inference.batch_size": 64,
}
IDS = VALIDATED | {
    "objective.beta": 1.0,
    "training.batch_size": 64,
}  # where a CF model says no beta
DECODER = IDS | {  # 20 items of a history, of four tokens each
    "ids.codes": (64, 64, 64),
    "prompt.max_tokens": 1 + 4 * 20,
    "training.buckets": (),
    "training.steps": 1200,
    "validation.every": 120,
    "optimizer.warmup_steps": 30,
}
BEAUTY = IDS | {"training.steps": 1500, "validation.every": 150}  # four epochs


def get_grid(arg=""):
    return Grid(
        data={
            "movielens": Data("../quickstart.py", ROWS | {"validation.rows": 1000}),
            "beauty": Data("../cf/beauty_sasrec.py", ROWS | {"validation.rows": 1000}),
            "office": Data("../cf/sasrec_published.py", ROWS | SOFTMAX),
        },
        cf={  # from weak to strong; beta: where the NLL of validation rows is about least
            "bpr_mf": CFModel({"cf.model": "bpr_mf", "cf.bpr_mf.loss": "softmax"}),
            "ease": CFModel(
                {"cf.model": "ease", "cf.label_items": 50},
                on={"movielens": {}, "beauty": {"cf.top_k": 300}, "office": {"cf.top_k": 300}},
                axes={"beta": (0.05,)},
            ),
            "sasrec": CFModel({"cf.model": "sasrec"}, axes={"beta": {"beauty": (1.4,)}}),
        },
        recommenders={
            "titles": Recommender(
                "../quickstart.py", VALIDATED, on={"movielens": {}, "office": PRODUCTS}
            ),
            "llara": Recommender(
                "../recommenders/llara.py",
                QUICK,
                on={"movielens": {}, "office": PRODUCTS},
                vectors="sasrec",
            ),
            "ids": Recommender(
                "../recommenders/tiger_decoder.py",
                on={"movielens": DECODER, "beauty": BEAUTY, "office": DECODER},
            ),
        },
        axes={
            "alpha": (0.0, 0.1, 0.5, 0.9),
            "guidance": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
            "seed": (0, 1, 2),
        },
        chosen=("alpha", "guidance"),
        choose_seeds=(0,),
    ).with_argument(arg)
