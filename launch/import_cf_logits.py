"""Writes anyone's CF logits for a split as a store of the run, from arrays or a table of scores:

    python launch/import_cf_logits.py --config=configs/quickstart.py --workdir=runs/x \\
        --split=train_sequences --source=mine.npy

Reads WORKDIR/data and --source. A .npy or .npz array is [rows or flat positions, items], the items
in the order of the catalogue; a .csv, .tsv, .jsonl or .parquet file has the columns item (its id),
score and one of row, position and user (the user's id). Writes config.cf.logits/SPLIT (default
WORKDIR/cf/logits/SPLIT).
"""

from absl import flags

from tca4rec_jax.cf.logits_import import import_logits
from tca4rec_jax.cf.logits_store import open_store, split_path
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.sequences import SPLITS
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import LocalPath
from tca4rec_jax.reporting import show

_SOURCE = DEFINE_field("source", LocalPath, None, "A file.", required=True)
_SPLIT = flags.DEFINE_enum("split", None, SPLITS, "What the logits are for.", required=True)
_NAME = flags.DEFINE_string("name", "imported", "The CF model's name, for the manifest.")
_FLOOR = DEFINE_field("floor", float, None, "A table: the logit of items without a score.")


def main(config, workdir):
    """Writes the store of --split and says what it holds."""
    data = load(workdir / "data", config.data)
    path = split_path(config.cf.logits, workdir, _SPLIT.value)
    sequences = data.splits[_SPLIT.value]
    import_logits(
        _SOURCE.value,
        path,
        sequences,
        data.catalogue,
        floor=_FLOOR.value,
        user_ids=data.user_ids,
        name=_NAME.value,
        dtype=config.cf.dtype,
        top_k=config.cf.top_k,
    )
    manifest = open_store(path, sequences, data.catalogue).manifest
    show(f"{path}: {manifest['kind']}, one event per {manifest['entries_per']}")
    show(f"entropy of the softmax, nats by beta: {manifest['temperature']['entropy_nats']}")


if __name__ == "__main__":
    launch(
        main,
        "import_cf_logits",
        run_on="main_process",
        reads=["data", _SOURCE],
        writes=["cf_logits"],
    )
