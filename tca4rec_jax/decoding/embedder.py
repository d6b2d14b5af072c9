"""Pools the hidden states of an LLM over texts: item embeddings, and grounding.

Axes: core/__init__.py.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from tca4rec_jax.core import Array
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.distributed import sharding
from tca4rec_jax.distributed.data_parallel import DataParallel
from tca4rec_jax.distributed.multihost import gather_to_host
from tca4rec_jax.llm.decoder import Decoder


@dataclass(frozen=True, eq=False)
class ItemTexts:
    """The texts of items as tokens.

    Attributes:
      tokens: int32 Ragged [I]; perhaps a BOS token, then the text.
      begin_I: int32 [I], where the text begins.
    """

    tokens: Ragged
    begin_I: np.ndarray


@dataclass(frozen=True, eq=False)
class Embedder:
    """Pools the hidden states of an LLM over texts, batch by batch."""

    decoder: Decoder  # on the mesh
    mesh: Mesh
    pooling: str  # 'mean' of a text's states, or the 'last'
    batch_size: int

    def embed(
        self, texts: ItemTexts, buckets: np.ndarray, rows_R: np.ndarray
    ) -> Iterator[np.ndarray]:
        """The vectors of some rows, the longest first: float32 [B, D], batch after batch.

        `buckets` are the padded lengths, int64 ascending; the program is compiled once for each.
        All processes get all vectors.
        """
        graph, state = nnx.split(self.decoder)
        here_B = sharding.local_rows(self.mesh, self.batch_size, "prompts")

        def run(start: int):
            rows_B = rows_R[start : start + self.batch_size]
            length_R = texts.tokens.lengths
            width = buckets[np.searchsorted(buckets, length_R[rows_B].max())]
            padded_B = np.resize(rows_B, self.batch_size)[here_B]
            batch = _Batch(
                texts.tokens.pad(padded_B, width, 0),
                texts.begin_I[padded_B],
                length_R[padded_B].astype(np.int32),
            )
            batch = sharding.shard_batch(self.mesh, batch, "prompts")
            return len(rows_B), _pooled(state, batch, self.mesh, graph, self.pooling)

        # Fetched after the next was dispatched.
        dispatched = itertools.chain(map(run, range(0, len(rows_R), self.batch_size)), [()])
        for (count, vectors), _ in itertools.pairwise(dispatched):
            yield gather_to_host(vectors)[:count]


class _Batch(NamedTuple):
    tokens_BxS: Array
    begin_B: Array
    length_B: Array


def pooled(
    decoder: Decoder, tokens_BxS: jax.Array, begin_B: jax.Array, length_B: jax.Array
) -> jax.Array:
    """The mean of the states of each row's tokens from `begin` on, float32 [B, D]; traceable."""
    states_BxSxD = decoder.hidden(tokens_BxS, length_B)
    position_1xS = jnp.arange(tokens_BxS.shape[1])[None]
    inside_BxS = (position_1xS >= begin_B[:, None]) & (position_1xS < length_B[:, None])
    chosen_BxSxD = jnp.where(inside_BxS[:, :, None], states_BxSxD.astype(jnp.float32), 0)
    return jnp.sum(chosen_BxSxD, axis=1) / jnp.sum(inside_BxS, axis=1, keepdims=True)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _pooled(state: nnx.State, batch: _Batch, mesh: Mesh, graph: nnx.GraphDef, pooling: str):
    """float32 [B, D]."""

    def run(state, batch):
        tokens_BxS, begin_B, length_B = batch
        begin_B = length_B - 1 if pooling == "last" else begin_B
        return pooled(nnx.merge(graph, state), tokens_BxS, begin_B, length_B)

    on_rows = DataParallel(mesh, "prompts")
    return on_rows(run, (PartitionSpec(), on_rows.rows), on_rows.rows)(state, batch)
