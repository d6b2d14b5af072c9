"""Where the numbers and tables of a run go besides its own files: trackers that people watch."""

import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from absl import logging
from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from tca4rec_jax.distributed.multihost import is_main_process
from tca4rec_jax.errors import UserError
from tca4rec_jax.fileio import fingerprint, remove
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
    """Several trackers as one; none at all by default.

    None of them ends a run: one that fails is said in a warning, and told nothing more.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]] | None = None):
        self._trackers: dict[str, Tracker] = {}
        for name, opener in (openers or {}).items():
            with self._or_without(name):
                self._trackers[name] = opener()

    @classmethod
    def open(
        cls,
        config: ConfigDict,
        folder: Path,
        made_from: Provenance,
        identity: str,
        start: int = 0,
    ) -> "Trackers":
        """Those of a run or an evaluation with this folder; they get config and provenance.

        It goes on after `start` steps: TensorBoard forgets what it was told of later ones, and
        Weights & Biases goes on with the run of this `identity`. Only in the main process of a job
        there are any.
        """
        if not is_main_process():
            return cls()
        tracking = TrackingConfig(**config.tracking)
        openers: dict[str, Callable[[], Tracker]] = {
            "TensorBoard": partial(_TensorBoard, folder / "tensorboard", start),
            "wandb": partial(_WeightsAndBiases, folder, config, identity),
            "clu": partial(_CLU, folder / "clu"),
        }
        opened = cls({name: openers[name] for name in ("TensorBoard", *tracking.also)})
        opened.text("config", _as_code(config.to_json_best_effort(indent=2)))
        opened.text("provenance", _as_code(made_from.to_json()))
        return opened

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tell(lambda tracker: tracker.close())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.scalars`."""
        self._tell(lambda tracker: tracker.scalars(step, values))

    def text(self, name: str, text: str) -> None:
        """As `Tracker.text`."""
        self._tell(lambda tracker: tracker.text(name, text))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._or_without(name):
                call(tracker)

    @contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a package raises
            self._trackers.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            logging.warning("%s is told nothing more of this run (%s)", name, why)


def _as_code(json_text: str) -> str:
    return f"```json\n{json_text}\n```"


class _TensorBoard:
    """Writes in the thread that calls, as nobody sees an error in that of SummaryWriter."""

    def __init__(self, folder: Path, start: int):
        if not start:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{start}")
        self._flushed = -math.inf
        if start:
            self._write(step=start, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        points = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(step=step, summary=Summary(value=points))

    def text(self, name: str, text: str) -> None:
        self._write(summary=summary.text(name, text))

    def close(self) -> None:
        self._events.close()

    def _write(self, **event: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **event))
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()


class _WeightsAndBiases:
    """One run there for each `identity` and folder here, also if it goes on.

    WANDB_MODE=offline keeps it on this machine.
    """

    def __init__(self, folder: Path, config: ConfigDict, identity: str):
        self._run = importlib.import_module("wandb").init(
            project=config.tracking.project,
            id=fingerprint([identity, folder.name]),
            name=folder.name,
            config=json.loads(config.to_json_best_effort()),
            allow_val_change=True,  # of a run that goes on: it may have more steps
            dir=str(folder),
            resume="allow",
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
