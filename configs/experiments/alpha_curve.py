"""Accuracy over alpha, small values and large ones, at two budgets: MovieLens-100K, SmolLM2-135M.

    G=configs/experiments/alpha_curve.py W=runs/alpha_curve
    python launch/experiments.py --grid=$G --workdir=$W

Nothing is chosen: all of it is ranked on validation rows, more than those on which
configs/experiments/claim.py chooses: give it a work directory of its own.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender

# Ten times, for the NLL alone; at four times the steps every 100.
VALIDATED = {"validation.every": 25, "validation.beams": 1}


def get_grid(arg=""):
    rows = {"evaluation.rows": 2000, "validation.rows": 1000}
    return Grid(
        data={"movielens": Data("../quickstart.py", rows)},
        cf={"sasrec": CFModel({"cf.model": "sasrec"})},
        recommenders={"titles": Recommender("../quickstart.py", VALIDATED)},
        axes={
            "alpha": (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
            "budget": (1.0, 4.0),
        },
        split="validation",
    ).with_argument(arg)
