"""Where the numbers and tables of a run go besides its own files: trackers that people watch."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import remove
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.ranges import Text, check_fields

_FLUSH_SECONDS = 10


@dataclass(frozen=True)
class TrackingConfig:
    """Trackers of losses, validations, the config, its provenance and the table of an evaluation.

    TensorBoard's files are always written.

    Attributes:
      also: further trackers, each with an extra of that name: 'wandb' (Weights & Biases), 'clu'.
      project: of Weights & Biases.

    Raises UserError for a tracker that is not installed.
    """

    also: tuple[Literal["wandb", "clu"], ...] = ()
    project: Text = "tca4rec_jax"

    def __post_init__(self):
        check_fields(self, "tracking.")
        for name in self.also:
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"tracking.also is {self.also}, but {name} is not installed: "
                    f"pip install '.[{name}]', or leave it out"
                )


class Tracker(Protocol):
    """Takes what one run or evaluation has to say, in one process of a job."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after so many steps."""

    def text(self, name: str, text: str) -> None:
        """A text in Markdown."""

    def close(self) -> None:
        """Returns when all is written."""


class Trackers:
    """Several trackers as one; none at all by default."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self._trackers = trackers

    @classmethod
    def open(
        cls, config: ConfigDict, folder: Path, made_from: Provenance, start: int = 0
    ) -> "Trackers":
        """Those of a run or an evaluation with this folder; they get config and provenance.

        It goes on after `start` steps: TensorBoard forgets what it was told of later ones. Only in
        the main process of a job there are any.
        """
        if not is_main_process():
            return cls()
        tracking, files = TrackingConfig(**config.tracking), folder / "tensorboard"
        if not start:
            remove(files)
        trackers: list[Tracker] = [_TensorBoard(files, start)]
        if "wandb" in tracking.also:
            name = f"{made_from.fingerprint[:16]}-{folder.name}"
            trackers.append(_WeightsAndBiases(folder, tracking.project, name))
        if "clu" in tracking.also:
            trackers.append(_CLU(folder / "clu"))
        opened = cls(trackers)
        opened.text("config", _as_code(config.to_json_best_effort(indent=2)))
        opened.text("provenance", _as_code(made_from.to_json()))
        return opened

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for tracker in self._trackers:
            tracker.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.scalars`."""
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def text(self, name: str, text: str) -> None:
        """As `Tracker.text`."""
        for tracker in self._trackers:
            tracker.text(name, text)


def _as_code(json_text: str) -> str:
    return f"```json\n{json_text}\n```"


class _TensorBoard:
    def __init__(self, folder: Path, start: int):
        options = {"flush_secs": _FLUSH_SECONDS, "filename_suffix": f".{start}"}
        if start:
            options["purge_step"] = start
        self._writer = SummaryWriter(str(folder), **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str) -> None:
        self._writer.add_text(name, text)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """One run there for each run here, also if it goes on after an interruption.

    WANDB_MODE=offline keeps it on this machine.
    """

    def __init__(self, folder: Path, project: str, name: str):
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=project, id=name, name=folder.name, dir=str(folder), resume="allow"
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def text(self, name: str, text: str) -> None:
        self._run.summary[name] = text

    def close(self) -> None:
        self._run.finish()


class _CLU:
    def __init__(self, folder: Path):
        self._writer = importlib.import_module("clu.metric_writers").create_default_writer(folder)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.write_scalars(step, values)

    def text(self, name: str, text: str) -> None:
        self._writer.write_texts(0, {name: text})

    def close(self) -> None:
        self._writer.close()
