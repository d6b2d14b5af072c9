"""Checkpoints of what is trained, the optimiser, the step and the data position (orbax).

With adapters the base model is never in a checkpoint: megabytes, not gigabytes.  Saves are
asynchronous and atomic (written beside, then renamed), so a killed process leaves the last complete
checkpoint.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from tca4rec_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if needed.
      keep: how many of the latest to keep.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(), options=options, item_names=("state", "data")
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, data_position: dict) -> None:
        """Starts saving; returns before the files are complete.

        Args:
          data_position: JSON-serialisable; what `restore` gives back.
        """
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position)
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The latest checkpoint, onto the shardings of `like`.

        Raises:
          FileNotFoundError: there is none.
          ValueError: its parameters or optimiser have other shapes than `like`.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(f"{self._manager.directory}: no checkpoint; train first")
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except ValueError as error:
            raise ValueError(
                f"{self._manager.directory}/{step} does not fit this configuration (config.lora, "
                f"config.llm or the model changed?); use another run name or delete it: {error}"
            ) from error
        return restored.state, restored.data

    def close(self) -> None:
        """Waits for a save in progress."""
        self._manager.wait_until_finished()
        self._manager.close()
