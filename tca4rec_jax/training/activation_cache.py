"""States after the layers that training leaves as they came, kept on disk.

Adapters in the upper layers only (lora.first_layer) leave a decoder's lower layers frozen, so that
a row's states behind these are the same in every epoch, at any alpha, beta and seed. Run once, they
need not be run again: neither by this training nor by others in the same work directory.

Axis letters: B batch, S sequence, D model, N batches.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.distributed.data_parallel import RowParallel
from tca4rec_jax.distributed.multihost import (
    barrier,
    broadcast_from_main,
    gather_to_host,
    is_main_process,
)
from tca4rec_jax.distributed.sharding import local_rows, shard_batch
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.decoder import Decoder


@dataclass(frozen=True, eq=False)
class FrozenStates:
    """A folder with one file per row of tokens: its states [S, D], named by the tokens.

    A file holds the bare numbers in the decoder's dtype; one of another size counts as missing.
    """

    directory: Path
    decoder: Decoder
    mesh: Mesh

    def fill(
        self, tokens: Ragged, batches: Sequence[tuple[np.ndarray, int]], batch_size: int
    ) -> None:
        """Runs the frozen layers for the rows that are missing.

        Whole batches run, as the training would run them, so that an interrupted call and the next
        one end with the same numbers as one that was not interrupted. All processes of a job call
        this alike, on a folder that all of them see.

        Args:
          tokens: int32, of all rows.
          batches: the rows of each, at most batch_size, and the length that they are padded to.

        Raises:
          OSError: naming a file that can't be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        batches = self._missing(tokens, batches)
        graph, state = nnx.split(self.decoder)
        here = local_rows(self.mesh, batch_size, "prompts")

        def keep(rows: np.ndarray, found: jax.Array) -> None:
            found_BxSxD = gather_to_host(found)
            if is_main_process():
                for place, row in enumerate(rows):
                    self._write(tokens[row], found_BxSxD[place, : tokens[row].size])

        pending = None
        disable = None if batches and is_main_process() else True
        for rows, width in tqdm(batches, desc="Frozen layers", unit="batch", disable=disable):
            padded = tokens.pad(np.resize(rows, batch_size), width, 0)  # of too few some twice
            on_mesh = shard_batch(self.mesh, padded[here], "prompts")
            found = _frozen_states(state, on_mesh, self.mesh, graph)
            if pending is not None:  # written while the next ones run
                keep(*pending)
            pending = rows, found
        if pending is not None:
            keep(*pending)
        barrier(f"frozen states of {len(batches)} batches")

    def read(self, tokens: Ragged, rows_B: np.ndarray, width: int) -> np.ndarray:
        """[B, width, D] of some rows of the tokens, zero behind each row's end.

        Raises UserError naming a file that is not what was written.
        """
        wide = self.decoder.config.hidden_size
        states_BxSxD = np.zeros((rows_B.size, width, wide), self._dtype)
        for place, row in enumerate(rows_B):
            path = self._path(tokens[row])
            values = np.fromfile(path, self._dtype)
            if values.size != tokens[row].size * wide:
                raise UserError(
                    f"{path} has {values.size} numbers, expected {tokens[row].size} tokens x {wide}"
                    ": delete it and start again"
                )
            states_BxSxD[place, : tokens[row].size] = values.reshape(-1, wide)
        return states_BxSxD

    def _missing(self, tokens: Ragged, batches) -> list[tuple[np.ndarray, int]]:
        """The batches with a row that has no file and is in no batch before."""
        seen, missing_N = set(), np.zeros(len(batches), bool)
        for number, (rows, _) in enumerate(batches):
            new = set(rows.tolist()) - seen
            missing_N[number] = not all(self._has(tokens[row]) for row in new)
            seen |= new
        chosen_N = np.frombuffer(broadcast_from_main(missing_N.tobytes, missing_N.size), bool)
        return [batch for batch, chosen in zip(batches, chosen_N, strict=True) if chosen]

    def _has(self, tokens_S: np.ndarray) -> bool:
        path = self._path(tokens_S)
        size = tokens_S.size * self.decoder.config.hidden_size * self._dtype.itemsize
        return path.exists() and path.stat().st_size == size

    def _write(self, tokens_S: np.ndarray, states_SxD: np.ndarray) -> None:
        path = self._path(tokens_S)
        beside = path.with_suffix(".partial")
        try:
            np.ascontiguousarray(states_SxD).tofile(beside)
            os.replace(beside, path)
        except OSError as error:  # a failed write does not say of what
            message = f"{error.strerror}; make room, or set training.keep_frozen_states=False"
            raise OSError(error.errno, message, str(path)) from error

    def _path(self, tokens_S: np.ndarray) -> Path:
        tokens_S = np.ascontiguousarray(tokens_S, np.int32)
        return self.directory / hashlib.blake2b(tokens_S, digest_size=16).hexdigest()

    @property
    def _dtype(self) -> np.dtype:
        return self.decoder.embedding[...].dtype


@partial(jax.jit, static_argnums=(2, 3))
def _frozen_states(state: nnx.State, tokens_BxS: jax.Array, mesh: Mesh, graph: nnx.GraphDef):
    on_rows = RowParallel(mesh, "prompts")
    run = on_rows(
        lambda state, tokens: nnx.merge(graph, state).frozen_states(tokens),
        in_specs=(PartitionSpec(), on_rows.rows),
        out_specs=on_rows.rows,
    )
    return run(state, tokens_BxS)


def frozen_layers_identity(llm: dict, layers: int, weights: Path) -> str:
    """Of all that the states depend on but the tokens: the layers, and the files of the weights."""
    files = sorted(weights.iterdir()) if weights.is_dir() else [weights]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    parts = {"llm": llm, "layers": layers, "files": stats}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
