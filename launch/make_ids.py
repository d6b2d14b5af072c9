"""Makes semantic ids of the items' embeddings, and reports on them or on the ids of others.

    python launch/make_ids.py --config=configs/quickstart.py --workdir=runs/x
    python launch/make_ids.py ... --config.ids.method=rq_vae --config.ids.collisions=counter
    python launch/make_ids.py ... --config.ids.item_vectors=vectors.npy
    python launch/make_ids.py ... --config.ids.path=their_ids.json        # the report alone

Reads WORKDIR/data (launch/prepare_data.py) and item embeddings (launch/embed_items.py, or your own
.npy); with CF logits (launch/train_cf.py) the report says what each level resolves of them. Writes
WORKDIR/ids: ids.json, report.md, .json and .png; the report on the ids of others is in
WORKDIR/ids_of_others.
"""

from tca4rec_jax.config import build
from tca4rec_jax.data.dataset import load
from tca4rec_jax.launching import launch
from tca4rec_jax.reporting import show, show_table
from tca4rec_jax.semantic_ids.pipeline import make_ids
from tca4rec_jax.semantic_ids.report import level_rows, lines_of
from tca4rec_jax.semantic_ids.rq_vae import RQVAEConfig
from tca4rec_jax.semantic_ids.settings import Quantiser


def main(config, workdir):
    """Makes the ids and prints the report."""
    report = make_ids(
        load(workdir / "data", config.data),
        workdir,
        build(Quantiser, config.ids),
        build(RQVAEConfig, config.ids.rq_vae),
        path=config.ids.path,
        cf=config.cf,
        beta=config.objective.beta,
    )
    show_table(level_rows(report), title="Semantic ids", first_column="level")
    show(*lines_of(report))


if __name__ == "__main__":
    launch(
        main,
        "make_ids",
        run_on="main_process",
        reads=["data", "item_embeddings", "cf_logits"],
        writes=["ids"],
    )
