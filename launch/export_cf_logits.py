"""Writes the CF logits of a run again: as .npy or Parquet, in another dtype, cut to K, or mixed.

    python launch/export_cf_logits.py --config=configs/quickstart.py --workdir=runs/x \\
        --format=npy --output=exported                 # exported/<split>.npy, float32
    python launch/export_cf_logits.py --config=... --workdir=runs/x --output=tables \\
        --format=parquet --top_k=100                   # user, row (or position), item, score
    python launch/export_cf_logits.py --config=... --workdir=runs/x --output=small \\
        --dtype=bfloat16 --top_k=100                   # stores, for --config.cf.logits=small
    python launch/export_cf_logits.py --config=... --workdir=runs/x --output=mixed \\
        --mix=runs/sasrec/cf/logits,runs/ease/cf/logits --weights=0.7,0.3 --temperatures=1,0.1

Reads the stores below config.cf.logits (default WORKDIR/cf/logits), or those of --mix, which must
have been written for the data in WORKDIR/data.
"""

from pathlib import Path

from absl import flags

from tca4rec_jax.cf.logits_export import export_npy, export_parquet, export_stores
from tca4rec_jax.cf.logits_format import DTYPES
from tca4rec_jax.data.dataset import load
from tca4rec_jax.data.sequences import SPLITS
from tca4rec_jax.launching import DEFINE_field, launch
from tca4rec_jax.ranges import Count, LocalPath, Temperature, check

_OUTPUT = flags.DEFINE_string("output", None, "A folder (or the URL of a bucket).", required=True)
_FORMAT = flags.DEFINE_enum("format", "store", ["store", "npy", "parquet"], "What is written.")
_SPLITS = flags.DEFINE_list("splits", list(SPLITS), "Which splits.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the stores.")
_TOP_K = DEFINE_field("top_k", Count, None, "Logits kept per event, and a floor; default: all.")
_DENSE = flags.DEFINE_bool("dense", False, "Multiply factorised stores out.")
_MIX = flags.DEFINE_list("mix", [], "Folders of stores to combine, instead of the run's.")
_WEIGHTS = DEFINE_field(
    "weights", tuple[float, ...], None, "One per folder of --mix; 1 if left out."
)
_TEMPERATURES = DEFINE_field(
    "temperatures", tuple[Temperature, ...], None, "One per folder of --mix; default: 1."
)


def main(config, workdir):
    """Writes the stores of the run, or the mixture of --mix, to --output."""
    data = load(workdir / "data", config.data)
    sources = _MIX.value or [config.cf.logits or str(workdir / "cf" / "logits")]
    if _FORMAT.value != "store":
        check("--output", _OUTPUT.value, LocalPath)
        given = Path(_OUTPUT.value), sources, data, _SPLITS.value
        if _FORMAT.value == "npy":
            export_npy(*given)
        else:
            export_parquet(*given, _TOP_K.value)
        return
    export_stores(
        _OUTPUT.value,
        sources,
        data,
        _SPLITS.value,
        weights=_WEIGHTS.value,
        temperatures=_TEMPERATURES.value,
        dense=_DENSE.value,
        dtype=_DTYPE.value,
        top_k=_TOP_K.value,
    )


if __name__ == "__main__":
    launch(
        main,
        "export_cf_logits",
        run_on="main_process",
        reads=lambda _: ["data", _MIX if _MIX.value else "cf_logits"],
        writes=[_OUTPUT],
    )
