"""Writes the LLM's embeddings of items: the mean of its last hidden states over their titles.

    python launch/embed_items.py --config=configs/quickstart.py --workdir=runs/x
    python launch/embed_items.py --workdir=runs/x --run=aligned --config.embedding.pooling=last

Reads WORKDIR/data (launch/prepare_data.py) and the LLM's weights. The LLM is the pretrained one, or
that of --run. Interrupted, the same command goes on. Writes WORKDIR/item_embeddings/embeddings.npy,
float32 [items, width] in the catalogue's order, and provenance.json. --config.embedding.text= says
what of an item is read.
"""

from tca4rec_jax.embedding import embed_items
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.launching import RUN, launch
from tca4rec_jax.reporting import show


def embed(config, workdir):
    """Embeds all items and prints where the file is."""
    show(str(embed_items(Experiment(config, workdir), RUN.value or "")))


if __name__ == "__main__":
    launch(
        embed,
        "embed_items",
        run_on="all_processes",
        reads=lambda _: ["data", "llm", *(["run"] if RUN.value else [])],
        writes=["item_embeddings"],
        config_of="run",
    )
