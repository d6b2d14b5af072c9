"""Sections of an evaluation's page about its runs: what they are, how they learned, their costs."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tca4rec_jax.config import default_config
from tca4rec_jax.evaluation.pictures import DRAWN, Curve, recorded, training_figure
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.fileio import read_json, read_json_lines
from tca4rec_jax.pages.blocks import Block, Numbers, Picture, Pictures, Section, Text
from tca4rec_jax.provenance import flatten, short
from tca4rec_jax.reporting import Cell, Rows

_TOLD = "evaluation.variants", "evaluation.differences", "run"
"""Fields that other tables of the page have."""
_PARTS = 10
"""Of a training, whose means are in the table beside its curve."""
ABOUT_CURVES = (
    "Lines are exponential moving averages; what each step had is pale behind them "
    f"({DRAWN} steps where there are more)."
)


def what_was_run(experiment: Experiment, results: Mapping) -> Section:
    """The models of the table, and the fields in which configs differ from the defaults."""
    steps = results["runs"]
    models = {
        label: {
            "run": run or "none: the LLM as it came",
            "steps": steps.get(run, 0),
            "lambda": f"{guidance:g}",
        }
        for label, run, guidance in results["provenance"]["inputs"]["compared.variants"]
    }
    configs = {name: experiment.runs[name].config for name in steps}
    every = {"this evaluation": results["config"], **configs}
    changed = settings({name: [config] for name, config in every.items()})
    blocks: list[Block] = [Numbers(models, "LLM", "The LLMs, and the runs that trained them")]
    if changed:
        words = f"Settings: {len(changed)} fields that differ from the defaults"
        blocks.append(Numbers(changed, "field", words, is_closed=True))
    return Section("What was run", blocks)


def settings(configs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, str]]:
    """{field: {'default': value, name: values}} of fields that some config has otherwise.

    Of one or more configs by each name, as their files hold them; a field that one of before does
    not have, or had and is no more, does not count.
    """
    default = dict(flatten(json.loads(default_config().to_json_best_effort())))
    flat = {name: [dict(flatten(one)) for one in several] for name, several in configs.items()}
    found = {}
    for field, value in default.items():
        of_each = {
            name: [one[field] for one in several if field in one] for name, several in flat.items()
        }
        if field not in _TOLD and any(one != value for of in of_each.values() for one in of):
            shown = {
                name: "; ".join(dict.fromkeys(map(_shown, of))) for name, of in of_each.items()
            }
            found[field] = {"default": _shown(value)} | {n: one for n, one in shown.items() if one}
    return found


def how_they_learned(experiment: Experiment, results: Mapping) -> Iterator[Section]:
    """A picture and a table of each quantity in the runs' logs; nothing without logs."""
    runs = {name: experiment.runs[name] for name in results["runs"]}
    curves = {name: read_json_lines(run.log) for name, run in runs.items()}
    if drawn := learned(curves, (key for run in runs.values() for key in run.drawn)):
        yield Section("Training", [Text(ABOUT_CURVES), *drawn])


def learned(
    curves: Mapping[str, Curve], keys: Iterable[str], *, alike: Mapping[str, str] | None = None
) -> list[Block]:
    """A picture and a table of each of the quantities `keys` that some log has.

    Of runs that look alike, as `training_figure`. None if no log has any of them.
    """
    keys = recorded(curves, dict.fromkeys(keys))
    if not keys:
        return []
    words = {key: f"{key} over steps of training: {_ends(curves, key)}" for key in keys}
    pictures = [Picture(words[key], training_figure(curves, [key], alike=alike)) for key in keys]
    tables = [
        Numbers(curve_table(curves, key), "run, steps", f"{key}: means of so many steps", True)
        for key in keys
    ]
    return [Pictures(pictures), *tables]


def curve_table(curves: Mapping[str, Curve], key: str) -> dict[str, dict[str, float]]:
    """{run, steps: {key: mean}} of equal parts of each run's records that have the key."""
    rows = {}
    for name, curve in curves.items():
        points = np.array([(line["step"], line[key]) for line in curve if key in line])
        for part in np.array_split(points, min(_PARTS, len(points))) if len(points) else ():
            first, last = part[[0, -1], 0].astype(int)
            rows[f"{name}, {first} to {last}"] = {key: float(part[:, 1].mean())}
    return rows


def costs(experiment: Experiment, results: Mapping) -> Section:
    """Of training: steps, tokens, time and speed of each run, as their logs have it."""
    rows: dict[str, Mapping[str, Cell]] = {}
    of_cf = experiment.workdir / "cf" / "metrics.json"
    if of_cf.is_file() and "seconds" in (metrics := read_json(of_cf, remedy="train it anew")):
        rows["CF model, all of it"] = {"minutes": f"{metrics['seconds'] / 60:.1f}"}
    for name in results["runs"]:
        rows[name] = run_costs(read_json_lines(experiment.runs[name].log))
    about = (
        "Of an LLM run: time in its steps, the first of which compile, and validations, without "
        "loading and hidden states that runs share; median speed. MFU: useful FLOPs, as a share of "
        "the peak."
    )
    return Section("Costs", [Text(about), Numbers(rows, "trained")])


def run_costs(log: Curve) -> dict[str, Cell]:
    """What a log says of them."""
    steps = [line for line in log if "tokens" in line]
    seconds = sum(value for line in log for key, value in line.items() if key.endswith("seconds"))
    found: dict[str, Cell] = {"minutes": f"{seconds / 60:.1f}", "steps": len(steps)}
    if steps:
        tokens, spent = np.array([(line["tokens"], line["seconds"]) for line in steps]).T
        found |= {
            "million tokens": f"{tokens.sum() / 1e6:.3g}",
            "tokens a second": f"{np.median(tokens / spent):.0f}",
            "MFU": f"{np.median([line['mfu'] for line in steps]):.2f}",
        }
    return found


def made_from(results: Mapping) -> Section:
    """The provenance: what the results depend on, and the versions that made them."""
    made = results["provenance"]
    inputs: Rows = {name: {"value": short(value)} for name, value in made["inputs"].items()}
    versions: Rows = {name: {"version": one} for name, one in made["versions"].items()}
    caption = f"{len(inputs)} inputs: settings, and hashes of what was read"
    tables = [Numbers(inputs, "input", caption, True), Numbers(versions, "package")]
    return Section("Made from", [Text(f"Written by `{made['command']}`."), *tables])


def _ends(curves: Mapping[str, Curve], key: str) -> str:
    """In words, where each run begins and ends in a quantity."""
    parts = []
    for name in curves:
        means = [row[key] for row in curve_table({name: curves[name]}, key).values()]
        parts += [f"{name} from {means[0]:.3g} to {means[-1]:.3g}"] if means else []
    return "; ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)
