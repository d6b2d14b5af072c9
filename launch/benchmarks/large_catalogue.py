"""The whole way with a large made catalogue: seconds, CPU seconds and peak memory of each step.

    python launch/benchmarks/large_catalogue.py --items=1000000 --workdir=runs/million

Titles branch as MovieLens' do, users are made (catalogues.py), the LLM is SmolLM2-135M. Each step
is the launch script of its name in a process of its own, and is left out where WORKDIR/steps.json
has it already (delete the folder to measure again). Flags after -- go to every step:
`-- --config.cf.sasrec.loss=bce`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags
from catalogues import write_tables
from measuring import QUICKSTART_MALLOC

from tca4rec_jax.fileio import atomic_path, read_json
from tca4rec_jax.reporting import show, show_table, write_results

_ITEMS = flags.DEFINE_integer("items", 1_000_000, "Of the catalogue.", lower_bound=1000)
_USERS = flags.DEFINE_integer("users", 100_000, "Each has 20 interactions.", lower_bound=1000)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
_CF_ROWS = flags.DEFINE_integer("cf_rows", 10_000, "Rows of validation and test.")
_ROWS = flags.DEFINE_integer("rows", 32, "Of these, ranked by the LLM.")
_STEPS = flags.DEFINE_integer("steps", 4, "Of the LLM's training, of 2 rows each.")
_EPOCHS = flags.DEFINE_integer("epochs", 1, "Of the CF model's training.")
NAMES = ["prepare_data", "train_cf", "train", "evaluate", "recommend"]
_ONLY = flags.DEFINE_multi_enum("only", [], NAMES, "A step; given several times; by default all.")

ROOT = Path(__file__).parents[2]


def commands(workdir: Path) -> dict[str, list[str]]:
    """{step: its script and flags}."""
    tables = workdir / "tables"
    fields = {
        "data.source": "files",
        "data.interactions": tables / "interactions.csv",
        "data.catalogue": tables / "items.csv",
        "data.samples": f"(20000,{_CF_ROWS.value},{_CF_ROWS.value})",
        "cf.sasrec.loss": "sampled_softmax",
        "cf.sasrec.negatives": 4096,
        "cf.sasrec.targets": "rows",
        "cf.max_epochs": _EPOCHS.value,
        "training.steps": _STEPS.value,
        "training.checkpoint_every": _STEPS.value,
        "training.cache_hidden_states": False,
        "evaluation.rows": _ROWS.value,
        "inference.batch_size": 16,
    }
    prepared = [
        f"--config={ROOT / 'configs/quickstart.py'}:run=aligned",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    more = {
        "evaluate": ["--runs=aligned", "--guidance=0,1"],
        "recommend": ["--guidance=1", "--item=0", "--item=1", "--item=2"],
    }
    return {name: [f"{name}.py", *prepared, *more.get(name, [])] for name in NAMES}


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Seconds, CPU seconds, peak memory (GB); SystemExit with a script's last line if it fails."""
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / command[0], *command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | QUICKSTART_MALLOC,
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]}: {log.read_text().strip().splitlines()[-1]}")
    return {
        "seconds": time.perf_counter() - began,
        "CPU seconds": used.ru_utime + used.ru_stime,
        "peak GB": used.ru_maxrss / 1e6,
    }


def main(argv):
    workdir = Path(_WORKDIR.value).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    sizes = (_ITEMS, _USERS, _CF_ROWS, _ROWS, _STEPS, _EPOCHS)
    made_of = {size.name: size.value for size in sizes} | {"more": argv[1:]}
    path = workdir / "steps.json"
    found = read_json(path) if path.exists() else {"of": made_of, "steps": {}}
    if found["of"] != made_of:
        sys.exit(f"{path} is of {found['of']}: delete {workdir}, or name another --workdir")
    write_results(path, found)
    steps = found["steps"]
    if not (workdir / "tables").exists():
        with atomic_path(workdir / "tables") as tables:
            write_tables(tables, _ITEMS.value, _USERS.value)
    for name, command in commands(workdir).items():
        if name in steps or (_ONLY.value and name not in _ONLY.value):
            continue
        steps[name] = measured([*command, *argv[1:]], workdir / f"{name}.log")
        write_results(path, found)
        show(f"{name}: {json.dumps(steps[name])}")
    show_table(steps, title=f"{_ITEMS.value:,} items", first_column="step", digits=1)


if __name__ == "__main__":
    app.run(main)
