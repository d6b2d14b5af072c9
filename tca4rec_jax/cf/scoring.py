"""User vectors of many positions, and how a CF model scores: rank, NLL, entropy, its profile.

Axis letters: S history length, K recommended items, T temperatures, W items of a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.batching import map_batches
from tca4rec_jax.cf.item_blocks import Entropy, Highest, fold, highest_of
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.windows import FlatRows, windows_at
from tca4rec_jax.core.collaborative_tokenizer import DENSE, CFItems
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.metrics import ahead_of, coverage

BETAS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""CF temperatures at which the softmax of CF logits is described."""
TOP = 10
_PROFILED = 1 << 31  # logits that a profile is made of: 2,147 rows of a million items
_NARROWEST = 16  # the least width to which the histories of a batch are padded


@dataclass(frozen=True, eq=False)
class LazyRows:
    """A function of the R rows of `source`, computed when sliced: never whole in memory."""

    function: Callable[[Any], np.ndarray]  # of m rows, float32 [m, columns]
    source: Any
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, columns)."""
        return len(self.source), self.columns

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.function(self.source[rows])


def host_items(model: CFModel) -> CFItems:
    """What `model.items()` gives, on the host."""
    return jax.tree.map(np.asarray, _items(*nnx.split(model)))


@functools.partial(jax.jit, static_argnums=0)
def _items(graph, state):
    return nnx.merge(graph, state).items()


def user_vectors(
    model: CFModel,
    sequences: ItemSequences,
    positions: np.ndarray | None = None,
    *,
    batch_size: int = 2048,
) -> LazyRows:
    """The user vector before each flat position: what predicts `sequences.items[position]`.

    `positions` are int [m], None for all in order; `batch_size` of them at a time are padded for
    the jitted program. Gives float32 [m, D]; the logits [m, I] of a model without an item table.
    Raises UserError for an item the model does not know, ValueError for a position that is none.
    """
    check_items(sequences, model.config.num_items)
    num_positions = len(sequences.items)
    positions = np.arange(num_positions) if positions is None else np.asarray(positions)
    if positions.size and (positions.min() < 0 or positions.max() >= num_positions):
        raise ValueError(f"flat positions must lie in 0..{num_positions - 1}")
    graph, state = nnx.split(model)
    longest, flat = model.config.history_length or 1, FlatRows.of(sequences)  # None: reads none

    def program(position_B, width=longest):
        return _vectors(graph, width, state, flat, position_B)

    def narrow(position_B):
        """The program of the least width, 16 times a power of two, that holds all histories."""
        needed = np.max(_histories(sequences, position_B), initial=1)
        width = _NARROWEST << int(-(-needed // _NARROWEST) - 1).bit_length()
        return program(position_B, min(width, longest))

    def short_first(position_m):
        order_m = np.argsort(_histories(sequences, position_m), kind="stable")
        vectors_mxD = map_batches(narrow, position_m[order_m], batch_size=batch_size)
        return vectors_mxD[np.argsort(order_m)]

    any_order = functools.partial(map_batches, program, batch_size=batch_size)
    vectors = short_first if has_widths(model) else any_order
    columns = jax.eval_shape(program, np.zeros(1, np.int32)).shape[1]
    return LazyRows(vectors, positions.astype(np.int32), columns)


def has_widths(model: CFModel) -> bool:
    """Whether batches of short histories are narrower: rows are best given by their lengths."""
    return model.any_width and model.config.history_length > _NARROWEST


def _histories(sequences: ItemSequences, position_m: np.ndarray) -> np.ndarray:
    """How many items are before each position in its row, int64 [m]."""
    return position_m - sequences.offsets[sequences.row_of(position_m)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vectors(graph, width, state, rows, position_B):
    model = nnx.merge(graph, state)
    history_BxS = windows_at(rows, position_B, width).history_BxS
    return model.user_vectors(history_BxS).astype(jnp.float32)


def check_items(sequences: ItemSequences, num_items: int) -> None:
    """Raises UserError if a row holds an item that the CF model has no embedding for."""
    outside = np.flatnonzero(sequences.items >= num_items)
    if outside.size:
        raise UserError(
            f"row {sequences.row_of(outside[0])} holds item index {sequences.items[outside[0]]}, "
            f"but the CF model knows {num_items} items (0..{num_items - 1}); train it on the "
            "current catalogue"
        )


@dataclass(frozen=True)
class RowScores:
    """How a CF model scores the target of each row; the softmax is at temperature 1."""

    rank: np.ndarray  # int32 [R], 0-based, in the whole catalogue (see tca4rec_jax.metrics)
    nll: np.ndarray  # float32 [R], -log of the target's share
    entropy: np.ndarray  # float32 [R], in nats


def score_rows(
    vector_RxD: np.ndarray | LazyRows,
    items: CFItems,
    target_R: np.ndarray,
    seen_RxS: np.ndarray | None = None,
    *,
    batch_size: int = 1024,
) -> RowScores:
    """Ranks every item for every row, `batch_size` rows and a block of the items at a time.

    Without an item table (`items`, see host_items) the vectors are the logits [R, I]. The items in
    `seen_RxS` (or PAD_ITEM) are left out of the ranking, unless they are the target, the item that
    came next; they count for NLL and entropy all the same.
    """
    score = functools.partial(_score_batch, jax.tree.map(jnp.asarray, items))
    columns = [vector_RxD, target_R.astype(np.int32), *([] if seen_RxS is None else [seen_RxS])]
    return RowScores(*map_batches(score, *columns, batch_size=batch_size))


def score_targets(
    model: CFModel, rows: ItemSequences, seen_RxS: np.ndarray | None = None
) -> RowScores:
    """`score_rows` of a CF model for rows whose last item is the target."""
    last = rows.last_positions
    vector_RxD = user_vectors(model, rows, last)
    return score_rows(vector_RxD, _items(*nnx.split(model)), rows.items[last], seen_RxS)


@jax.jit
def _score_batch(items, vector_BxD, target_B, seen_BxS=None):
    rows = len(target_B)

    def look(state, logits_BxW, item_W):
        entropy, own_B = state
        is_target_BxW = item_W[None, :] == target_B[:, None]
        return entropy.add(logits_BxW), highest_of(logits_BxW, is_target_BxW, own_B)

    none = Entropy.nothing(rows), jnp.full(rows, -jnp.inf)
    entropy, own_B = fold(look, none, vector_BxD, items)

    def count(rank_B, logits_BxW, item_W):
        if seen_BxS is not None:
            width, place_BxS = len(item_W), seen_BxS - item_W[0]
            stays_BxS = (place_BxS < 0) | (seen_BxS == target_B[:, None])
            place_BxS = jnp.where(stays_BxS, width, place_BxS)
            row_Bx1 = jnp.arange(rows)[:, None]
            logits_BxW = logits_BxW.at[row_Bx1, place_BxS].set(-jnp.inf, mode="drop")
        ahead_BxW = ahead_of(logits_BxW, item_W, own_B, target_B)
        return rank_B + jnp.sum(ahead_BxW, axis=1, dtype=jnp.int32)

    rank_B = fold(count, jnp.zeros(rows, jnp.int32), vector_BxD, items)
    return rank_B, entropy.log_sum.value_B - own_B, entropy.value_B


def profile(model: CFModel, rows: ItemSequences, count_I: np.ndarray) -> dict:
    """Describes a CF model beyond its accuracy, on rows whose last item is the target.

    'coverage@10' is the share of the catalogue among anyone's first ten; 'relative popularity@10'
    the mean training interactions (`count_I`, int) of the first tens over that of the targets;
    'entropy' and 'nll' (of the target) are {beta: nats} of the softmax at that CF temperature;
    'best_beta' is the beta of BETAS with the lowest NLL: where this model is calibrated best. Of a
    large catalogue these are of some of the rows alone.
    """
    most = max(_PROFILED // len(count_I), 1)
    if len(rows) > most:
        rows = rows.take(np.linspace(0, len(rows) - 1, most).astype(np.int64))
    vector_RxD = user_vectors(model, rows, rows.last_positions)
    target_R = rows.items[rows.last_positions]
    describe = functools.partial(_describe, _items(*nnx.split(model)))
    best_RxK, entropy_RxT, nll_RxT = map_batches(describe, vector_RxD, target_R, batch_size=1024)
    nll_T = nll_RxT.mean(axis=0)
    return {
        f"coverage@{TOP}": coverage(best_RxK, len(count_I)),
        f"relative popularity@{TOP}": float(
            count_I[best_RxK].mean() / max(count_I[target_R].mean(), 1e-9)
        ),
        "entropy": _by_beta(entropy_RxT.mean(axis=0)),
        "nll": _by_beta(nll_T),
        "best_beta": BETAS[int(np.argmin(nll_T))],
    }


@jax.jit
def _describe(items, vector_BxD, target_B):
    """The best items int32 [B, K]; entropy and NLL at every beta of BETAS, float32 [B, T] each."""
    rows, betas_T = len(target_B), jnp.asarray(BETAS, jnp.float32)

    def look(state, logits_BxW, item_W):
        entropy_T, own_B, highest = state
        is_target_BxW = item_W[None, :] == target_B[:, None]
        return (
            jax.lax.map(lambda of: of[0].add(logits_BxW / of[1]), (entropy_T, betas_T)),
            highest_of(logits_BxW, is_target_BxW, own_B),
            highest.add(logits_BxW, item_W),
        )

    num_items = vector_BxD.shape[1] if items.table_IxD is None else len(items.table_IxD)
    none_T = jax.tree.map(lambda a: jnp.stack([a] * len(BETAS)), Entropy.nothing(rows))
    none = none_T, jnp.full(rows, -jnp.inf), Highest.nothing(rows, min(TOP, num_items))
    entropy_T, own_B, highest = fold(look, none, vector_BxD, items)
    nll_TxB = entropy_T.log_sum.value_B - own_B[None, :] / betas_T[:, None]
    return highest.items_BxM, entropy_T.value_B.T, nll_TxB.T


def temperature_statistics(logits_mxI: np.ndarray) -> dict:
    """What the CF temperature beta will mean: spread of some logits, entropy at every beta."""
    _, entropy_mxT, _ = _describe(DENSE, logits_mxI, np.zeros(len(logits_mxI), np.int32))
    return {
        "sampled_entries": len(logits_mxI),
        "mean": float(logits_mxI.mean(dtype=np.float64)),
        "standard_deviation": float(logits_mxI.std(axis=1, dtype=np.float64).mean()),
        "lowest": float(logits_mxI.min()),
        "highest": float(logits_mxI.max()),
        "entropy_nats": _by_beta(np.asarray(entropy_mxT).mean(axis=0)),
    }


def _by_beta(values_T: np.ndarray) -> dict[str, float]:
    return {f"{beta:g}": float(value) for beta, value in zip(BETAS, values_T, strict=True)}
