"""User vectors of many positions, and how the rows of a split score: rank, NLL, entropy.

CF logits are user_vector . item_row + item_bias, in float32 whatever the accelerator's default
matmul precision is: they become probabilities.

Axis letters: R rows, B rows of one batch, n flat positions, S history length, I items, D width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.windows import row_starts, windows_before
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.metrics import rank_in_batch


def cf_logits(
    vector_BxD: jax.Array,
    item_table_IxD: jax.Array | None,
    item_bias_I: jax.Array | None = None,
) -> jax.Array:
    """CF logits of every item, float32 [B, I]; without a table the vectors are them; traceable."""
    if item_table_IxD is None:
        return vector_BxD.astype(jnp.float32)
    logits_BxI = jnp.einsum(
        "bd,id->bi",
        vector_BxD,
        item_table_IxD,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return logits_BxI if item_bias_I is None else logits_BxI + item_bias_I[None, :]


@dataclass(frozen=True, eq=False)
class LazyRows:
    """Rows that are computed when they are sliced: as long as an array, never whole in memory.

    Attributes:
      shape: (rows, columns).
      compute: (start, stop) -> float32 [stop - start, columns].
    """

    shape: tuple[int, int]
    compute: Callable[[int, int], np.ndarray]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self.compute(start, stop)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def item_arrays(model: nnx.Module) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What `model.items()` gives, on the host: item table and bias, or None."""
    graph, state = nnx.split(model)
    return tuple(None if array is None else np.asarray(array) for array in _items(graph, state))


@functools.partial(jax.jit, static_argnums=0)
def _items(graph, state):
    return nnx.merge(graph, state).items()


def entries(
    model: nnx.Module, sequences: ItemSequences, positions: np.ndarray | None = None
) -> LazyRows:
    """What a logits store holds per flat position, [m, D] or dense [m, I], computed when read.

    The arguments and errors are those of `user_vectors`.
    """
    positions = _checked_positions(model, sequences, positions)
    table_IxD, _ = item_arrays(model)
    columns = model.config.num_items if table_IxD is None else table_IxD.shape[1]

    def compute(start, stop):
        return user_vectors(model, sequences, positions[start:stop])

    return LazyRows((len(positions), columns), compute)


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
      float32 [m, D]; the logits [m, I] of a model without an item table.

    Raises:
      ValueError: a history longer than the model reads, an item the model does not know, or a
        position outside the sequences.
    """
    check_history_length(history_length, model.config.history_length)
    positions = _checked_positions(model, sequences, positions)
    graph, state = nnx.split(model)
    flat = (jnp.asarray(sequences.items), jnp.asarray(row_starts(sequences)))
    size = min(batch_size, max(len(positions), 1))
    batches = []
    for start in range(0, max(len(positions), 1), size):
        batch = positions[start : start + size]
        padded_B = np.pad(batch, (0, size - len(batch))).astype(np.int32)
        vectors_BxD = _vectors(graph, state, *flat, padded_B, history_length)
        batches.append(np.asarray(vectors_BxD)[: len(batch)])
    return np.concatenate(batches)


def _checked_positions(model, sequences, positions) -> np.ndarray:
    check_items(sequences, model.config.num_items)
    num_positions = len(sequences.items)
    positions = np.arange(num_positions) if positions is None else np.asarray(positions)
    if positions.size and (positions.min() < 0 or positions.max() >= num_positions):
        raise ValueError(f"flat positions must lie in 0..{num_positions - 1}")
    return positions


@functools.partial(jax.jit, static_argnums=(0, 5))
def _vectors(graph, state, items_n, row_starts_n, position_B, history_length):
    model = nnx.merge(graph, state)
    length = model.config.history_length or 1  # a model that reads no history has None
    history_BxS = windows_before(items_n, row_starts_n, position_B, length)
    if history_length is not None:
        visible_S = np.arange(length) >= length - history_length
        history_BxS = jnp.where(visible_S[None, :], history_BxS, PAD_ITEM)
    return model.user_vectors(history_BxS).astype(jnp.float32)


def check_history_length(wanted: int | None, available: int | None) -> None:
    """Raises ValueError if a CF model cannot read as much history as is asked for (None: any)."""
    if None not in (wanted, available) and not 1 <= wanted <= available:
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
      rank: int32 [R], 0-based (see tca4rec_jax.metrics).
      nll: float32 [R], -log softmax(logits)[target] at temperature 1.
      entropy: float32 [R], entropy in nats of softmax(logits) at temperature 1.
    """

    rank: np.ndarray
    nll: np.ndarray
    entropy: np.ndarray


def score_rows(
    entry_RxD: np.ndarray | LazyRows,
    item_table_IxD: np.ndarray | None,
    item_bias_I: np.ndarray | None,
    target_R: np.ndarray,
    seen_RxS: np.ndarray | None = None,
    *,
    batch_size: int = 1024,
) -> RowScores:
    """Ranks every item for every row; logits exist only for one batch at a time.

    Args:
      entry_RxD: user vectors, or the logits [R, I] where there is no item table.
      item_table_IxD, item_bias_I: of the CF model; None where it has none.
      target_R: the item that came next.
      seen_RxS: items (or PAD_ITEM) that are left out of the ranking, the target never; they count
        for NLL and entropy all the same. None leaves out none.
      batch_size: rows of one call of the jitted program; the last batch is padded.
    """
    num_rows = len(target_R)
    size = min(batch_size, max(num_rows, 1))
    columns = [np.empty(num_rows, dtype) for dtype in (np.int32, np.float32, np.float32)]
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        padding = ((0, size - (stop - start)), (0, 0))
        entry_BxD = np.pad(entry_RxD[start:stop], padding)
        target_B = np.pad(target_R[start:stop], padding[0]).astype(np.int32)
        seen_BxS = None if seen_RxS is None else np.pad(seen_RxS[start:stop], padding)
        scored = _score_batch(entry_BxD, item_table_IxD, item_bias_I, target_B, seen_BxS)
        for column, values_B in zip(columns, scored, strict=True):
            column[start:stop] = np.asarray(values_B)[: stop - start]
    return RowScores(*columns)


@jax.jit
def _score_batch(entry_BxD, item_table_IxD, item_bias_I, target_B, seen_BxS):
    logits_BxI = cf_logits(entry_BxD, item_table_IxD, item_bias_I)
    log_share_BxI = jax.nn.log_softmax(logits_BxI, axis=1)
    nll_B = -jnp.take_along_axis(log_share_BxI, target_B[:, None], axis=1)[:, 0]
    entropy_B = -jnp.sum(jnp.exp(log_share_BxI) * log_share_BxI, axis=1)
    if seen_BxS is not None:
        row_Bx1 = jnp.arange(len(target_B))[:, None]
        out_BxS = jnp.where(
            (seen_BxS == PAD_ITEM) | (seen_BxS == target_B[:, None]), logits_BxI.shape[1], seen_BxS
        )
        logits_BxI = logits_BxI.at[row_Bx1, out_BxS].set(-jnp.inf, mode="drop")
    return rank_in_batch(logits_BxI, target_B), nll_B, entropy_B
