"""Does a config fit a machine? Compiles its real programs for it, here, without it.

    python launch/compile_ahead.py --config=configs/llama_3_2_3b.py:chips=16 --target=v5e-16
    python launch/compile_ahead.py --config=... --target=h100-8,a6000-1 --compare=plain --json=x

Reads the config alone: no weights, no data. Writes --json and --hlo, if they are given.
Targets: v5e-16, v5p-8, v6e-16, h100-8, a100-8, a6000-1, cpu (other sizes alike). Programs: train,
prefill (of the prompts), search (beam search after them: of a recommender that answers Yes or No,
among its two answers), and if asked for guided_search (the same, guided by the CF model). Exit
status: 0 all fit, 1 one does not, 2 something is wrong (a compiler is missing: the message is the
line that installs it).
"""

import sys
from pathlib import Path

from absl import flags

from tca4rec_jax.compile_ahead import report
from tca4rec_jax.compile_ahead.estimate import compile_for
from tca4rec_jax.compile_ahead.programs import PROGRAMS, AbstractExperiment, train
from tca4rec_jax.compile_ahead.targets import Target
from tca4rec_jax.config_checks import validate
from tca4rec_jax.errors import check_choice
from tca4rec_jax.fileio import write_text
from tca4rec_jax.launching import CONFIG, DRY_RUN, WORKDIR, DEFINE_field, launch_alone
from tca4rec_jax.ranges import LocalPath
from tca4rec_jax.reporting import markdown_table, show, show_table, write_results

_TARGET = flags.DEFINE_list("target", None, "The machines to compile for, of one platform.")
_PROGRAMS = flags.DEFINE_list(
    "programs", ["train", "prefill", "search"], f"Some of {', '.join(PROGRAMS)}."
)
_ITEMS = flags.DEFINE_integer("items", 10_000, "Size of the catalogue.", lower_bound=10)
_COMPARE = flags.DEFINE_enum("compare", None, ["plain"], "Also the step without the CF part.")
_JSON = DEFINE_field("json", LocalPath, None, "A file for everything that was found.")
_HLO = DEFINE_field("hlo", LocalPath, None, "A folder for the programs' optimised HLO.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "The table as Markdown.")


def compile_target(target: Target) -> dict:
    """Compiles and reports for one target; everything that was found."""
    name = target.name
    experiment = AbstractExperiment(CONFIG.value, target=target, num_items=_ITEMS.value)
    show(*report.heading(experiment))
    estimates = []
    for program in _PROGRAMS.value:
        estimate = compile_for(PROGRAMS[program](experiment), program, target)
        estimates.append(estimate)
        if _HLO.value:
            write_text(Path(_HLO.value) / f"{name}_{program}.hlo", estimate.hlo)
    rows = {one.program: report.row(one) for one in estimates}
    if _MARKDOWN.value:
        show(*markdown_table(rows, first_column="program", digits=2).splitlines())
    else:
        show_table(rows, title="", digits=2)
    show(*report.LEGEND)
    found = report.as_json(estimates, experiment)
    if _COMPARE.value and "train" in _PROGRAMS.value:
        plain = compile_for(train(experiment, projected=False), "train", target)
        ours = estimates[_PROGRAMS.value.index("train")]
        found["compared"] = report.compared(ours, plain)
        show(found["compared"])
    for estimate in estimates:
        if advice := report.advice(estimate, experiment):
            show(advice)
    show(f"{name}: {'fits' if found['fits'] else 'does not fit'}", "")
    return found


def compile_ahead():
    """Compiles and reports for every target; the exit status says whether all fits."""
    for program in _PROGRAMS.value:
        check_choice("--programs", program, PROGRAMS)
    validate(CONFIG.value)
    targets = [Target.parse(name) for name in _TARGET.value]
    if DRY_RUN.value:
        show("compile_ahead: the config is valid", f"  compiles for {', '.join(_TARGET.value)}")
        return
    found = [compile_target(target) for target in targets]
    if _JSON.value:
        write_results(Path(_JSON.value), {"targets": found})
    sys.exit(0 if all(one["fits"] for one in found) else 1)


if __name__ == "__main__":
    takes, required = [CONFIG, WORKDIR, DRY_RUN], ["config", "target"]
    launch_alone(compile_ahead, "compile_ahead", takes=takes, required=required, failed=2)
