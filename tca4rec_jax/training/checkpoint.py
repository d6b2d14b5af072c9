"""Checkpoints (orbax): the trained parameters, the optimizer state, the step and the data position.

With adapters the base model is never in a checkpoint: megabytes, not gigabytes.  Saves are
asynchronous and atomic, so a killed process leaves the last complete checkpoint.  The latest
checkpoints, the one of the lowest training loss and the best by validation are kept; one that
cannot be read is passed over.

All processes of a job call everything here at the same steps.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from tca4rec_jax.distributed.multihost import all_processes, barrier, is_main_process
from tca4rec_jax.errors import UserError, check_choice
from tca4rec_jax.training.fault_tolerance import CheckpointError
from tca4rec_jax.training.state import TrainState, Tree

_UNREADABLE = "unreadable_"  # before the step in the name of a directory that was set aside


class Checkpoints:
    """The checkpoints of one run: the latest `keep`, that of the lowest training loss, the `best`.

    Validation says which step is the best so far, if there is one; the attribute may change. If
    `writable`, the directory is created and what a killed process has left half-written removed;
    else it is only read, and nothing set aside. Raises UserError for a path that orbax cannot read.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 2,
        *,
        writable: bool = True,
        best: int | None = None,
    ):
        self._directory, self._writable, self.best = Path(directory).absolute(), writable, best
        self._keep, self._loss_of_step = keep, {}
        if writable and "[" in str(self._directory):  # orbax takes it for a pattern and loses files
            raise UserError(
                f"{self._directory}: checkpoints below a path with '[' cannot be read again: give "
                "another --workdir or --config.run"
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            create=writable,
            cleanup_tmp_directories=writable,  # by the first process, before anything is saved
        )
        names = "state", "data"
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=names)
        for step in self._manager.all_steps():
            self._loss_of_step[step] = _saved_loss(self._directory / str(step))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Waits for a save in progress; its error is only logged if the block raised one."""
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            logging.warning("%s", error)

    def should_preserve(self, checkpoints: Sequence, *, context) -> Sequence[bool]:
        """Which checkpoints to keep; for orbax, of which this is a preservation policy."""
        steps = [one.step for one in checkpoints]
        lowest = min(steps, key=lambda step: self._loss_of_step.get(step, math.inf))
        kept = {lowest, self.best, *sorted(steps)[-self._keep :]}
        return [step in kept for step in steps]

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, readable or not."""
        return self._manager.latest_step()

    def steps(self, which: str = "last") -> list[int]:
        """The steps of all checkpoints, first the one that `which` says.

        Raises UserError for another name than those of `inference.checkpoint`, or for 'best' where
        there is no checkpoint of the best step.
        """
        check_choice("inference.checkpoint", which, ("last", "lowest_training_loss", "best"))
        steps = sorted(self._manager.all_steps(), reverse=True)
        if which == "lowest_training_loss":
            steps.sort(key=lambda step: self._loss_of_step[step])
        if which == "best":
            if self.best not in steps:
                missing = f"that of step {self.best} is not there" if self.best else "none was made"
                raise UserError(
                    f"{self._directory}: inference.checkpoint is 'best' by validation, but "
                    f"{missing}: give 'last', or train with config.validation"
                )
            steps.sort(key=lambda step: step != self.best)
        return steps

    def save(self, state: TrainState, data_position: dict, loss: float = math.inf) -> None:
        """Starts saving; returns before the files are complete.

        `restore` gives back data_position, JSON-serialisable. The loss, by which
        'lowest_training_loss' chooses, is the mean of the steps since the checkpoint before. Raises
        CheckpointError if this one or the one before could not be written.
        """
        step = int(state.step)
        data = data_position | {"loss": loss, "checksums": checksums(state)}
        self._loss_of_step[step] = loss
        saved = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**saved), force=True)

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; does not wait."""
        with self._explained():
            self._manager.check_for_errors()

    def restore(self, like: TrainState, which: str = "last") -> tuple[TrainState, dict]:
        """The checkpoint that `which` says, as in `steps`, and its data position.

        It comes onto the shardings of `like`, whatever devices it was written on. One that cannot
        be read is named in a warning and set aside, and the one before it is taken, unless it is
        the best. Where nothing is written it is an error: readers say of which step they read.

        Raises:
          FileNotFoundError: there is none.
          UserError: its parameters or optimiser have other shapes than `like`.
          CheckpointError: no checkpoint can be read, or not the best, or not that of a reader.
        """
        steps = self.steps(which)
        if not steps:
            raise FileNotFoundError(f"{self._directory}: no checkpoint; train first")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in steps:
            restored, problem = self._read(step, abstract)
            if all_processes(restored is not None) and restored:
                state, data = restored
                if data.get("checksums") in (None, checksums(state)):  # old ones have none
                    return restored
                problem = "its values are not those that were saved"
            problem = problem or "by another process"
            why = f"{self._directory / str(step)} cannot be read ({problem})"
            if which == "best":
                raise CheckpointError(f"{why}: give inference.checkpoint=last, or train anew")
            if not self._writable:
                raise CheckpointError(f"{why}: go on training, which takes the one before it")
            logging.warning("%s: the checkpoint before it is taken instead", why)
            self._set_aside(step)
        raise CheckpointError(
            f"{self._directory}: none of the checkpoints {sorted(steps)} can be read; delete the "
            "folder to train from the start"
        )

    def restore_common(self, params: Tree) -> Tree:
        """Parameters, of which those that the last checkpoint has too are taken from it.

        They come onto the shardings of `params`. Raises FileNotFoundError if there is no
        checkpoint, UserError if it has none of them, or one of another shape, CheckpointError if
        their values are not those that were saved.
        """
        if (step := self.latest_step) is None:
            raise FileNotFoundError(f"{self._directory}: no checkpoint; train first")
        folder = self._directory / str(step)
        item = epath.Path(folder / "state")
        here = {f"params/{name}": leaf for name, leaf in _by_name(params).items()}
        saved = _by_name(ocp.StandardCheckpointHandler().metadata(item).tree)
        common = {name: leaf for name, leaf in here.items() if name in saved}
        if not common:
            raise UserError(f"{folder} has none of the parameters that this run changes")
        for name, leaf in common.items():
            if tuple(saved[name].shape) != leaf.shape:
                raise UserError(
                    f"{folder}: {name} is {tuple(saved[name].shape)}, expected {leaf.shape}: start "
                    "from a run of the same config.lora, config.projector and ids"
                )
        wanted = unflatten_dict(jax.tree.map(ocp.utils.to_shape_dtype_struct, common), sep="/")
        places = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=places, partial_restore=True)
        restored = ocp.PyTreeCheckpointHandler().restore(item, args=args)
        found = flatten_dict(restored, sep="/")
        written = _read_data(folder).get("checksums", {})  # old ones have none
        if broken := [
            name for name, now in checksums(found).items() if written.get(name, now) != now
        ]:
            raise CheckpointError(
                f"{folder}: the values of {', '.join(broken[:3])} are not those that were saved: "
                "delete this checkpoint, or train that run anew"
            )
        leaves = here | found
        return jax.tree.unflatten(jax.tree.structure(params), [leaves[name] for name in here])

    def _read(self, step: int, abstract: TrainState) -> tuple[tuple[TrainState, dict] | None, str]:
        """((state, data), '') or (None, why not); no process waits for another."""
        folder, handler = self._directory / str(step), ocp.StandardCheckpointHandler()
        item = epath.Path(folder / "state")
        try:
            state = handler.restore(item, args=ocp.args.StandardRestore(abstract))
            data = _read_data(folder)
            if not isinstance(data, dict):
                raise UserError(f"its data position is {data!r}")
            return (state, data), ""
        except Exception as error:  # whatever a damaged file makes orbax or tensorstore raise
            differ = _differences(item, abstract)
            if differ:
                raise UserError(
                    f"{folder} does not fit this configuration (config.lora, config.llm or the "
                    f"model changed?): {differ}; use another run name or delete it"
                ) from error
            return None, f"{type(error).__name__}: {_first_line(error)}"

    def _set_aside(self, step: int) -> None:
        """Renames a checkpoint, so that its step can be saved again."""
        self._loss_of_step.pop(step)
        if is_main_process():
            folder = self._directory / str(step)
            beside = self._directory / f"{_UNREADABLE}{step}"
            others = (beside.with_name(f"{beside.name}_{n}") for n in itertools.count(1))
            paths = itertools.chain([beside], others)
            folder.rename(next(path for path in paths if not path.exists()))
        barrier("checkpoint set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for a save in progress. Raises CheckpointError if it fails."""
        with self._explained():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what orbax raises while saving into a CheckpointError."""
        try:
            yield
        except Exception as error:
            complete = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
            last = f"step {max(complete)}" if complete else "none"
            raise CheckpointError(
                f"{self._directory}: a checkpoint could not be written ({type(error).__name__}: "
                f"{_first_line(error)}). The last complete one is {last}, it is "
                "intact: make room or writable, then start again"
            ) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, cut; an error may have no message."""
    return (str(error).splitlines() or ["no message"])[0][:300]


def checkpoints_to_fit(training, there: Sequence[int], validated_every: int = 0) -> int:
    """How many more checkpoints the disk must hold, at the moment when they are the most.

    Those are the latest, the one of the lowest loss, the best if there are validations, and the one
    that is being written, less those that are `there`; a run that saves less often never has so
    many. `training` is config.training.
    """
    steps = training.steps - max(there, default=0)
    saves = math.ceil(steps / training.checkpoint_every)
    if validated_every:
        saves += steps // validated_every
    most = training.keep_checkpoints + 2 + (validated_every > 0)
    return max(min(most - len(there), saves), 0)


def checksums(tree) -> dict[str, int]:
    """The sum of each leaf's bit patterns, modulo 2 ** 32, which any flipped bit changes.

    By the names of the leaves; the same on any mesh.
    """
    return {name: int(value) for name, value in jax.device_get(_bit_sums(_by_name(tree))).items()}


@jax.jit
def _bit_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bit_sum(array):
        width = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(array, width).astype("uint32").sum(dtype="uint32")

    return jax.tree.map(bit_sum, leaves)


def _saved_loss(folder: Path) -> float:
    """The loss saved with a checkpoint; infinite if it cannot be read."""
    try:
        return float(_read_data(folder)["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def _read_data(folder: Path):
    return json.loads((folder / "data" / "metadata").read_text())


def _differences(folder: epath.Path, abstract: TrainState) -> str:
    """The arrays whose shapes differ from those wanted; '' if none do, or if it is unreadable."""
    try:
        saved = _shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)
    except Exception:
        return ""
    wanted = _shapes(abstract)
    differ = [name for name in wanted | saved if saved.get(name) != wanted.get(name)]
    return "; ".join(
        f"{name} is {saved.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in differ[:5]
    )


def _by_name(tree) -> dict[str, Any]:
    """The leaves of a tree by the names of their path, joined with '/'."""
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _by_name(tree).items()}
