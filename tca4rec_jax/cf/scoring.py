"""User vectors of many positions, and how the rows of a split score: rank, NLL, entropy.

CF logits are user_vector . item_row + item_bias, in float32 whatever the accelerator's default
matmul precision is: they become probabilities.

Axis letters: R rows, B rows of one batch, n flat positions, S history length, I items, D width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.windows import row_starts, windows_before
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.ranking import rank_in_batch


def cf_logits(
    vector_BxD: jax.Array, item_table_IxD: jax.Array, item_bias_I: jax.Array | None = None
) -> jax.Array:
    """CF logits of every item, float32 [B, I]; traceable."""
    logits_BxI = jnp.einsum(
        "bd,id->bi",
        vector_BxD,
        item_table_IxD,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return logits_BxI if item_bias_I is None else logits_BxI + item_bias_I[None, :]


def user_vectors(
    model: nnx.Module,
    sequences: ItemSequences,
    positions: np.ndarray | None = None,
    *,
    history_length: int | None = None,
    batch_size: int = 2048,
) -> np.ndarray:
    """The user vector before each flat position: what predicts `sequences.items[position]`.

    Args:
      model: a CF model with `user_vectors(history_BxS)` and a config with `history_length` and
        `num_items`.
      sequences: the rows.
      positions: int [m] flat positions; None for all of them in order.
      history_length: how many items the vectors shall see; None for the model's own length.
      batch_size: positions per call of the jitted program; the last batch is padded.

    Returns:
      float32 [m, D].

    Raises:
      ValueError: a history longer than the model reads, an item the model does not know, or a
        position outside the sequences.
    """
    check_history_length(history_length, model.config.history_length)
    check_items(sequences, model.config.num_items)
    num_positions = len(sequences.items)
    positions = np.arange(num_positions) if positions is None else np.asarray(positions)
    if positions.size and (positions.min() < 0 or positions.max() >= num_positions):
        raise ValueError(f"flat positions must lie in 0..{num_positions - 1}")
    graph, params = nnx.split(model)
    flat = (jnp.asarray(sequences.items), jnp.asarray(row_starts(sequences)))
    size = min(batch_size, max(len(positions), 1))
    batches = []
    for start in range(0, len(positions), size):
        batch = positions[start : start + size]
        padded_B = np.pad(batch, (0, size - len(batch))).astype(np.int32)
        vectors_BxD = _vectors(graph, params, *flat, padded_B, history_length)
        batches.append(np.asarray(vectors_BxD)[: len(batch)])
    if not batches:
        return np.zeros((0, model.config.units), np.float32)
    return np.concatenate(batches)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _vectors(graph, params, items_n, row_starts_n, position_B, history_length):
    model = nnx.merge(graph, params)
    length = model.config.history_length
    history_BxS = windows_before(items_n, row_starts_n, position_B, length)
    if history_length is not None:
        visible_S = np.arange(length) >= length - history_length
        history_BxS = jnp.where(visible_S[None, :], history_BxS, PAD_ITEM)
    return model.user_vectors(history_BxS).astype(jnp.float32)


def check_history_length(wanted: int | None, available: int) -> None:
    """Raises ValueError if a CF model cannot read as much history as is asked for."""
    if wanted is not None and not 1 <= wanted <= available:
        raise ValueError(
            f"the history is {wanted} items long, but the CF model reads 1 to {available}; train "
            "the CF model with a longer history_length or shorten the history"
        )


def check_items(sequences: ItemSequences, num_items: int) -> None:
    """Raises ValueError if a row holds an item that the CF model has no embedding for."""
    outside = np.flatnonzero(sequences.items >= num_items)
    if outside.size:
        row = int(np.searchsorted(sequences.offsets, outside[0], side="right")) - 1
        raise ValueError(
            f"row {row} holds item index {sequences.items[outside[0]]}, but the CF model knows "
            f"{num_items} items (0..{num_items - 1}); train it on the current catalogue"
        )


@dataclass(frozen=True)
class RowScores:
    """How a CF model scores the target of each row against the whole catalogue.

    Attributes:
      rank: int32 [R], 0-based (see tca4rec_jax.ranking).
      nll: float32 [R], -log softmax(logits)[target] at temperature 1.
      entropy: float32 [R], entropy in nats of softmax(logits) at temperature 1.
    """

    rank: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray


def score_rows(
    vector_RxD: np.ndarray,
    item_table_IxD: np.ndarray,
    target_R: np.ndarray,
    item_bias_I: np.ndarray | None = None,
    *,
    batch_size: int = 1024,
) -> RowScores:
    """Ranks every item for every row; logits exist only for one batch at a time."""
    num_rows = len(target_R)
    size = min(batch_size, max(num_rows, 1))
    columns = [np.empty(num_rows, dtype) for dtype in (np.int32, np.float32, np.float32)]
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        missing = size - (stop - start)
        vector_BxD = np.pad(vector_RxD[start:stop], ((0, missing), (0, 0)))
        target_B = np.pad(target_R[start:stop], (0, missing)).astype(np.int32)
        scored = _score_batch(vector_BxD, item_table_IxD, item_bias_I, target_B)
        for column, values_B in zip(columns, scored, strict=True):
            column[start:stop] = np.asarray(values_B)[: stop - start]
    return RowScores(*columns)


@jax.jit
def _score_batch(vector_BxD, item_table_IxD, item_bias_I, target_B):
    logits_BxI = cf_logits(vector_BxD, item_table_IxD, item_bias_I)
    log_share_BxI = jax.nn.log_softmax(logits_BxI, axis=1)
    nll_B = -jnp.take_along_axis(log_share_BxI, target_B[:, None], axis=1)[:, 0]
    entropy_B = -jnp.sum(jnp.exp(log_share_BxI) * log_share_BxI, axis=1)
    return rank_in_batch(logits_BxI, target_B), nll_B, entropy_B
