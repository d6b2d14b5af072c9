"""Prepares the data of a run: users' histories, split by time, and the items' titles.

    python launch/prepare_data.py --config=configs/quickstart.py --workdir=runs/quickstart

Reads the files that config.data names; MovieLens-100K, the default, is fetched once. Writes
WORKDIR/data and says how many rows each split has. A second run with the same settings reuses the
files; with other settings it stops and says so. --beam_runner makes and writes the rows with Apache
Beam, the same bytes; --beam_options are options of its pipeline:

    --beam_runner=FlinkRunner --beam_options="--flink_master=HOST:8081 --parallelism=16"
"""

import shlex

from absl import flags

from tca4rec_jax.data.dataset import prepare, statistics
from tca4rec_jax.errors import UserError
from tca4rec_jax.launching import launch
from tca4rec_jax.reporting import show, show_table

_BEAM_RUNNER = flags.DEFINE_string(
    "beam_runner", None, "Make the rows with Apache Beam: DirectRunner, DataflowRunner, ..."
)
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "Options of the Beam pipeline.")
LEGEND = (
    "a row's last item is its target; tied: the target shares its time with the item before",
    "it (?: not known); repeated: the target is in its own history; seen users, seen items: the",
    "user, the target is in train_sequences",
)


def _beam():
    """The options of a Beam pipeline that the flags say; None without one."""
    try:
        options = shlex.split(_BEAM_OPTIONS.value)
    except ValueError as error:
        raise UserError(f"--beam_options={_BEAM_OPTIONS.value}: {error}") from error
    if runner := _BEAM_RUNNER.value:
        return [f"--runner={runner}", *options]
    if options:
        raise UserError("--beam_options needs --beam_runner")
    return None


def main(config, workdir):
    """Prepares the data and prints their sizes."""
    prepare(config.data, workdir / "data", _beam())
    summary = statistics(workdir / "data")
    rows = {
        split: {
            "rows": f"{counts['rows']:,}",
            "users": f"{counts['users']:,}",
            "length": f"{counts['mean_length']:.1f}",
            "tied": "?" if counts["tied"] is None else f"{counts['tied']:.1%}",
            "repeated": f"{counts['repeated']:.1%}",
            "seen users": f"{counts['seen_users']:.1%}",
            "seen items": f"{counts['seen_items']:.1%}",
        }
        for split, counts in summary["splits"].items()
    }
    title = f"{summary['items']:,} items, {summary['distinct_titles']:,} distinct titles"
    show_table(rows, title=title, first_column="split")
    show(*LEGEND)


if __name__ == "__main__":
    launch(main, "prepare_data", run_on="main_process", reads=["source"], writes=["data"])
