"""What an evaluation compares: the rows of its table by label, and their differences."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from tca4rec_jax.cf.logits_store import read_manifest, split_path
from tca4rec_jax.config import score_weights
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.decoding.list_inputs import list_inputs
from tca4rec_jax.errors import UserError
from tca4rec_jax.evaluation.rankings import CF, POPULAR, EvaluationRows
from tca4rec_jax.experiment import Experiment
from tca4rec_jax.provenance import Provenance, StaleError
from tca4rec_jax.ranges import FolderName, check

COMMAND = "launch/evaluate.py"
"""Makes all that evaluations write."""

NLL = "nll per title"
"""The name of that metric."""

CF_LOGITS = "CF logits"
"""The name of their content hash among inputs."""

UNTRAINED = "untrained"
"""The name of the pretrained LLM among those of runs."""


class Comparison(NamedTuple):
    """The rows of a table and their differences."""

    variants: tuple[tuple[str, str, float], ...]  # label, run or '', guidance
    differences: tuple[tuple[str, str], ...]  # pairs of labels

    @property
    def labels(self) -> list[str]:
        """Those of the table's rows, in order."""
        return [POPULAR, CF, *(label for label, _, _ in self.variants)]

    @property
    def guidances(self) -> dict[str, dict[str, float]]:
        """{run, or '' for the pretrained LLM: {label: guidance}}."""
        found: dict[str, dict[str, float]] = {}
        for label, run, guidance in self.variants:
            found.setdefault(run, {})[label] = guidance
        return found

    def check(self) -> "Comparison":
        """Returns itself; UserError for a label of two rows, or a difference of none."""
        for label in self.labels:
            if self.labels.count(label) > 1:
                raise UserError(
                    f"evaluation.variants: the label {label!r} stands for two rows of the table "
                    f"({POPULAR!r} and {CF!r} are always among them); give each variant its own"
                )
        if unknown := {label for pair in self.differences for label in pair} - {*self.labels}:
            raise UserError(
                f"evaluation.differences names {sorted(unknown)}; the table has "
                f"{sorted(self.labels)}"
            )
        return self


def comparison(
    experiment: Experiment, runs: Sequence[str] = (), guidances: Sequence[float] = ()
) -> Comparison:
    """What is compared: the `runs` at the `guidances`, or what config.evaluation says.

    If neither names runs, they are all finished ones that fit the config, and the pretrained LLM.
    Raises UserError for a run that is not there, saying which are, and as Comparison.check and
    Experiment.check_run. Nothing big is loaded.
    """
    evaluation = experiment.config.evaluation
    found = Comparison(evaluation.variants, evaluation.differences)
    if runs or guidances or not evaluation.variants:
        named = runs or [name or UNTRAINED for name in found.guidances]
        named = list(dict.fromkeys(named)) or [*_usable_runs(experiment), UNTRAINED]
        weights = sorted({*map(float, guidances)}) or [0.0]
        found = by_name(named, weights)
        if evaluation.differences and not (runs or guidances):
            found = found._replace(differences=evaluation.differences)
    there = experiment.runs
    for name, labels in found.check().guidances.items():
        if name and name not in there:
            states = (f"{run!r}{_in_brackets(one.unfinished)}" for run, one in there.items())
            raise UserError(
                f"{experiment.workdir / 'llm'} has no run {name!r}: there are "
                f"{', '.join([*states, repr(UNTRAINED)])}; name those to compare, as in --runs="
                f"{','.join([*there, UNTRAINED])}"
            )
        if name:
            experiment.check_run(name, guided=any(labels.values()))
    return found


def by_name(names: Sequence[str], guidances: Sequence[float]) -> Comparison:
    """Every named run at every guidance, and the differences that follow from the names.

    A run alone is compared to the untrained LLM and to the first run; a guided one to itself alone
    and to the CF model.
    """

    def label(name: str, guidance: float) -> str:
        return f"{name}, lambda = {guidance:g}" if guidance else name

    first = next((name for name in names if name != UNTRAINED), None)
    variants, pairs = [], [(CF, POPULAR)]
    for name in names:
        baselines = [one for one in names if one in (UNTRAINED, first) and name != UNTRAINED]
        for guidance in guidances:
            row = label(name, guidance)
            variants.append((row, "" if name == UNTRAINED else name, guidance))
            others = [name, CF] if guidance else baselines
            kept = [one for one in others if one != row and (one == CF or 0 in guidances)]
            pairs += [(row, other) for other in kept]
    return Comparison(tuple(variants), tuple(pairs))


def inputs_of(experiment: Experiment, rows: EvaluationRows, compared: Comparison) -> dict[str, Any]:
    """What results depend on: what is compared (a name of its own), and what that was made from."""
    config, catalogue = experiment.config, experiment.data.catalogue
    fields = {name: config.evaluation[name] for name in ("split", "rows", "seed", "temperatures")}
    lists = {
        run or UNTRAINED: list_inputs(
            experiment, run, [score_weights(config, one) for one in labels.values()]
        )
        for run, labels in compared.guidances.items()
    }
    return {
        "compared": fields
        | compared._asdict()
        | {"allowed items": experiment.item_filter.content_hash()},
        **rows.inputs(),
        **{f"evaluation.{name}": config.evaluation[name] for name in ("cutoffs", "hits")},
        "evaluation.text_match": config.evaluation.text_match or None,
        "objective.beta": config.objective.beta,
        "catalogue": catalogue.content_hash(),
        "titles": Catalogue(catalogue.item_ids, catalogue.titles).content_hash(),
        "training rows": experiment.data.splits["train_sequences"].content_hash(),
        "split": experiment.data.splits[config.evaluation.split].content_hash(),
        CF_LOGITS: cf_logits_hash(experiment, config.evaluation.split),
        "lists": lists,
    }


def cf_logits_hash(experiment: Experiment, split: str) -> str:
    """The content hash of a split's CF logits. Raises LogitsStoreError if there are none."""
    return read_manifest(split_path(experiment.config.cf.logits, experiment.workdir, split))[
        "content_hash"
    ]


def results_folder(workdir: Path, name: str) -> Path:
    """Where reports are: in the work directory, or by name below results in it; UserError."""
    if name:
        check("--name", name, FolderName)
    return workdir / "results" / name if name else workdir


def check_same_comparison(path: Path, made_from: Provenance) -> None:
    """Raises UserError if the results at `path` are of another comparison than `made_from`."""
    if not path.exists():
        return
    now = {n: v for n, v in made_from.inputs.items() if n.startswith("compared.")}
    try:
        saved = json.loads(path.read_text("utf-8"))["provenance"]
        changed = Provenance.from_json(json.dumps(saved), path).differences(now)
    except (StaleError, TypeError, ValueError, KeyError):
        changed = ["it does not say what it compares"]
    if changed:
        raise UserError(
            f"{path} is of another comparison ({changed[0].removeprefix('compared.')}): give this "
            "one a name, --name=NAME, or move that one away"
        )


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _usable_runs(experiment: Experiment) -> list[str]:
    """The finished runs that fit the config; the others are said."""
    usable = []
    for name, run in experiment.runs.items():
        try:
            if run.unfinished and not experiment.config.inference.unfinished:
                raise UserError(run.unfinished)
            experiment.check_run(name)
            usable.append(name)
        except (UserError, FileNotFoundError) as error:
            logging.warning("The run %r is left out: %s", name, error)
    return usable
