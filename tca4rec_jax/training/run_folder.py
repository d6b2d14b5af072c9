"""The folder of an LLM run: what the run was made from, how far it is, who may take it.

provenance.json   what the checkpoints depend on
config.json       the config of the latest training
checkpoints/, log.jsonl, tensorboard/, clu/, wandb/, profile/
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import read_json, read_json_lines, write_text
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.ranges import FolderName, check
from tca4rec_jax.training.validation import (
    NLL,
    SECTION,
    Outcome,
    ValidationConfig,
    validations_of,
)

COMMAND = "launch/train.py under another --config.run"
STEPS = "training.steps"  # the one input that may change while the run goes on
_HIDDEN_STATES = "hidden_states_"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One LLM run."""

    path: Path

    @classmethod
    def of(cls, workdir: Path, name: str) -> "RunFolder":
        """The LLM run of that name, which need not be there; UserError if it leads elsewhere."""
        check("run", name, FolderName)
        return cls(workdir / "llm" / name)

    @classmethod
    def all(cls, workdir: Path) -> list["RunFolder"]:
        """The LLM runs of a work directory, by name; not what a failed start has left empty."""
        folders = sorted((workdir / "llm").glob("[!.]*/"))
        runs = (path for path in folders if not path.name.startswith(_HIDDEN_STATES))
        return [cls(path) for path in runs if any(path.iterdir())]

    @staticmethod
    def hidden_states(workdir: Path, made_from: Provenance) -> Path:
        """The folder of hidden states that LLM runs share."""
        return workdir / "llm" / f"{_HIDDEN_STATES}{made_from.fingerprint[:16]}"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def saved_steps(self) -> list[int]:
        """The steps of all checkpoints."""
        names = (path.name for path in self.checkpoints.glob("[0-9]*/"))
        return sorted(int(name) for name in names if name.isdigit())

    @property
    def trained_steps(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        return max(self.saved_steps, default=0)

    @property
    def steps(self) -> int:
        """How many steps the run is to have. Raises StaleError as `made_from`."""
        return self.made_from.inputs.get(STEPS, 0)

    @property
    def validation(self) -> ValidationConfig:
        """When and by what it is validated. Raises StaleError as `made_from`."""
        inputs, prefix = self.made_from.inputs, f"{SECTION}."
        fields = {n.removeprefix(prefix): v for n, v in inputs.items() if n.startswith(prefix)}
        return ValidationConfig(**fields)

    @property
    def outcome(self) -> Outcome:
        """What follows from the run's validations. Raises StaleError as `made_from`."""
        return Outcome.of(self.validation, self._validations)

    @property
    def _validations(self) -> dict[int, dict[str, float]]:
        """Those of the saved steps: a run that goes on makes later ones anew."""
        if not self.validation.is_on:
            return {}
        trained, found = self.trained_steps, validations_of(read_json_lines(self.log))
        return {step: values for step, values in found.items() if step <= trained}

    @property
    def unfinished(self) -> str:
        """How far it is, in words; '' for a finished run, also for one that validation ended."""
        try:
            steps, config, found = self.steps, self.validation, self._validations
        except UserError as error:
            return str(error)
        trained = self.trained_steps
        done = f"{trained} of {steps} steps"
        if Outcome.of(config, found).ended:
            return ""
        if not 0 < steps <= trained:
            return done
        return f"{done}, the last not validated" if config.is_on and steps not in found else ""

    @property
    def drawn(self) -> list[str]:
        """The names in the log that show how it learned. Raises StaleError as `made_from`."""
        return quantities(self.validation.metric)

    @property
    def made_from(self) -> Provenance:
        """What the checkpoints depend on; StaleError if the folder does not say."""
        return Provenance.load(self.path)

    @property
    def log(self) -> Path:
        """The file with a line for every step and validation."""
        return self.path / "log.jsonl"

    @property
    def config_path(self) -> Path:
        """The file of the config of the latest training."""
        return self.path / "config.json"

    @property
    def config(self) -> dict[str, Any]:
        """The config of the latest training. Raises FileNotFoundError, or UserError if damaged."""
        path = self.config_path
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {self._how_to_train}")
        return read_json(path, remedy=self._how_to_train)

    def begin(self, made_from: Provenance, config: str) -> None:
        """Writes down what is trained from now on. All processes of a job call it.

        A run without checkpoints begins. One that has some goes on, and must have been made from
        the same: UserError (StaleError) if not, or if it has more steps already. Another number of
        steps in all is said in a warning, as it changes the schedule of the learning rate.
        """
        if trained := self.trained_steps:
            before = self.made_from  # what is used no more is None now
            now = {**dict.fromkeys(before.inputs), **made_from.inputs}
            before.check({k: v for k, v in now.items() if k != STEPS}, self.path)
            was, steps = before.inputs.get(STEPS), made_from.inputs[STEPS]
            if steps < trained:
                raise UserError(
                    f"{self.path} has {trained} steps, but {STEPS} is {steps}: give at least "
                    f"{trained}, or another --config.run"
                )
            if steps != was:
                logging.warning(
                    f"{self.path}: {STEPS} was {was}, is {steps}: after step {trained} the "
                    f"learning rate follows the schedule of {steps} steps"
                )
        if is_main_process():
            made_from.save(self.path)
            write_text(self.config_path, config)

    def check(self, now: Mapping[str, Any], *, unfinished: bool = False) -> None:
        """Refuses a run that is not what a reader takes it for, before anything is loaded.

        Args:
          now: the inputs that inference depends on, as they are here now.
          unfinished: whether a run that has not all its steps may be taken.

        Raises FileNotFoundError for a run without checkpoints, StaleError for one that was made
        from other inputs, UserError for an unfinished one.
        """
        trained = self.trained_steps
        if not trained:
            raise FileNotFoundError(
                f"{self.path}: no such run, or no checkpoint of it: {self._how_to_train}"
            )
        self.made_from.check(now, self.path)
        if not unfinished and (done := self.unfinished):
            raise UserError(
                f"{self.path} is unfinished, it has {done}: go on with "
                f"launch/train.py --config.run={self.path.name}, or take it as it is with "
                "--config.inference.unfinished=true"
            )

    def check_checkpoint(self, position: Mapping[str, Any]) -> None:
        """Raises UserError for a checkpoint (its data position) that another run has written."""
        if position.get("inputs") != inputs_of(self.made_from):
            raise UserError(
                f"{self.checkpoints} is of another run than {self.path / 'provenance.json'}: "
                "put back what was there, or train anew under another --config.run"
            )

    @property
    def _how_to_train(self) -> str:
        return f"train it with launch/train.py --config.run={self.path.name}"


def quantities(metric: str) -> list[str]:
    """The names in the log of a run, validated by a metric, that show how it learned."""
    metrics = dict.fromkeys((NLL, metric))
    return ["loss", "nll_per_title", "grad_norm", *(f"{SECTION}/{name}" for name in metrics)]


def inputs_of(made_from: Provenance) -> str:
    """What a checkpoint says that it was made from: the fingerprint of all inputs but the steps."""
    inputs = {name: value for name, value in made_from.inputs.items() if name != STEPS}
    return dataclasses.replace(made_from, inputs=inputs).fingerprint
