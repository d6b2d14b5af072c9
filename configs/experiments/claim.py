"""Does the alignment help, across CF models and recommenders? MovieLens-100K and Amazon Beauty.

    G=configs/experiments/claim.py:beauty.data.interactions=Beauty.inter.json
    python launch/experiments.py --grid=$G,ids.ids.path=Beauty.index.json --workdir=runs/claim

alpha and guidance are chosen on validation rows, with the first seed; the test rows are ranked with
these and with alpha = 0. Beauty has no titles: there an LLM reads and writes semantic ids.
"""

from tca4rec_jax.experiments.grid import CFModel, Data, Grid, Recommender
