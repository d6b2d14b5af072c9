"""The activation cache: hidden states after the frozen prefix of the LLM, kept on disk.

Adapters in the upper layers only (lora.first_layer) leave the layers below, the frozen prefix,
unchanged: a row's hidden states after it are the same in every epoch, at any alpha, beta and seed.
They are computed once, for this training and for every other one in the same work directory.

Axes: core/__init__.py; here N are batches.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.multihost import (
    barrier,
    broadcast_from_main,
    gather_to_host,
    is_main_process,
)
from tca4rec_jax.distributed.sharding import local_rows, shard_batch
from tca4rec_jax.fileio import atomic_path, check_room
from tca4rec_jax.llm.decoder import Decoder
from tca4rec_jax.provenance import Provenance
from tca4rec_jax.terminal import Progress

_WITHOUT = "give --config.training.cache_hidden_states=false"


@dataclass(frozen=True, eq=False)
class ActivationCache:
    """A folder with one file per row of tokens: its hidden states [S, D], named by the tokens.

    A file holds the bare numbers in the decoder's dtype; one of another size counts as missing.
    """

    directory: Path  # made by `fill`; for several processes one that all of them see
    decoder: Decoder  # its layers below lora.first_layer are the frozen prefix
    mesh: Mesh  # of the decoder
    made_from: Provenance  # everything that the numbers depend on besides the tokens

    def fill(self, tokens: Ragged, batches: Sequence[tuple[np.ndarray, int, int]]) -> None:
        """Runs the frozen prefix for the rows of tokens, int32, that are missing.

        `batches` has (rows int64, how many a whole batch has, padded length). Whole batches run, as
        in training, so that an interrupted call and the next one end with the same numbers as an
        uninterrupted call. All processes of a job call this alike. Raises OSError naming a file
        that can't be written, StaleError for a folder of other hidden states; UserError, before
        anything runs, for a disk without room for them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.glob("[!.]*")):  # not what another process begins to write
            Provenance.load(self.directory).check(self.made_from.inputs, self.directory)
        elif is_main_process():
            with _explained(self.directory):
                self.made_from.save(self.directory)
        batches = self._missing(tokens, batches)
        self._check_room(tokens, batches)
        graph, state = nnx.split(self.decoder)

        def run(rows: np.ndarray, size: int, width: int):
            padded = tokens.pad(np.resize(rows, size), width, 0)  # a short batch repeats rows
            local = local_rows(self.mesh, size, "prompts")
            tokens_BxS = shard_batch(self.mesh, padded[local], "prompts")
            return rows, _run_prefix(state, tokens_BxS, self.mesh, graph)

        ran = itertools.chain(itertools.starmap(run, batches), [()])
        with Progress("Frozen layers", len(batches), "batches") as progress:
            for (rows, states), _ in itertools.pairwise(ran):  # written while the next batch runs
                states_BxSxD = gather_to_host(states)
                if is_main_process():
                    for number, row in enumerate(rows):
                        self._write(tokens[row], states_BxSxD[number, : tokens[row].size])
                progress.advance()
        barrier(f"hidden states of {len(batches)} batches")

    def read(self, tokens: Ragged, rows_B: np.ndarray, width: int) -> np.ndarray:
        """Hidden states [B, width, D] of some rows of the tokens, zero after each row's end.

        Raises ValueError naming a file of another size.
        """
        hidden_size = self.decoder.config.hidden_size
        states_BxSxD = np.zeros((rows_B.size, width, hidden_size), self._dtype)
        for number, row in enumerate(rows_B):
            path = self._path(tokens[row])
            values = np.fromfile(path, self._dtype)
            if values.size != tokens[row].size * hidden_size:
                raise ValueError(
                    f"{path} has {values.size} numbers, expected {tokens[row].size} tokens x "
                    f"{hidden_size}: delete it and start again"
                )
            states_BxSxD[number, : tokens[row].size] = values.reshape(-1, hidden_size)
        return states_BxSxD

    def _missing(self, tokens: Ragged, batches) -> list[tuple[np.ndarray, int, int]]:
        """The batches with a row that has no file and is in no batch before."""
        seen: set[int] = set()
        missing_N = np.zeros(len(batches), bool)
        for number, (rows, *_) in enumerate(batches):
            new = set(rows.tolist()) - seen
            missing_N[number] = not all(self._has(tokens[row]) for row in new)
            seen |= new
        chosen_N = np.frombuffer(broadcast_from_main(missing_N.tobytes, missing_N.size), bool)
        return list(itertools.compress(batches, chosen_N))

    def _check_room(self, tokens: Ragged, batches: Sequence[tuple[np.ndarray, int, int]]) -> None:
        """Says what the rows of batches will take on the disk; UserError if it is not there."""
        if not batches:
            return
        rows = np.unique(np.concatenate([rows for rows, *_ in batches]))
        numbers = int(tokens.lengths[rows].sum()) * self.decoder.config.hidden_size
        num_bytes = numbers * self._dtype.itemsize
        what = f"hidden states of {rows.size} rows"
        logging.info(f"{what} take {num_bytes / 1e9:.2f} GB in {self.directory}")
        check_room(self.directory, num_bytes, what, _WITHOUT)

    def _has(self, tokens_S: np.ndarray) -> bool:
        path = self._path(tokens_S)
        size = tokens_S.size * self.decoder.config.hidden_size * self._dtype.itemsize
        return path.exists() and path.stat().st_size == size

    def _write(self, tokens_S: np.ndarray, states_SxD: np.ndarray) -> None:
        path = self._path(tokens_S)
        with _explained(path), atomic_path(path) as temporary:
            np.ascontiguousarray(states_SxD).tofile(temporary)

    def _path(self, tokens_S: np.ndarray) -> Path:
        tokens_S = np.ascontiguousarray(tokens_S, np.int32)
        return self.directory / hashlib.blake2b(tokens_S.tobytes(), digest_size=16).hexdigest()

    @property
    def _dtype(self) -> np.dtype:
        return self.decoder.embedding[...].dtype


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a failed write does not say of what
        message = f"{error.strerror}; make room, or {_WITHOUT}"
        raise OSError(error.errno, message, str(path)) from error


@partial(jax.jit, static_argnums=(2, 3))
def _run_prefix(state: nnx.State, tokens_BxS: jax.Array, mesh: Mesh, graph: nnx.GraphDef):
    """Hidden states [B, S, D] after the frozen prefix."""

    def run(state, tokens_BxS):
        return nnx.merge(graph, state).frozen_prefix(tokens_BxS)

    on_rows = DataParallel(mesh, "prompts")
    return on_rows(run, (PartitionSpec(), on_rows.rows), on_rows.rows)(state, tokens_BxS)
