"""What a CF model is, and what the models share: tables, attention, dropout, statistics.

Axis letters: B batch, S positions of a history, Q those that ask, I items, D width, N heads, H head
dim.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, check_fields

Key = jax.Array | None


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a CF model: sizes of the data, then fields with a default, the user's.

    The catalogue has I items; the model reads the last S of a history. Raises UserError if a size,
    the heads or the dropout are out of range.
    """

    num_items: Count
    history_length: Count

    def __post_init__(self):
        model, values = type(self).__name__.removesuffix("Config"), vars(self)
        check_fields(self, f"{model}'s ")
        units, heads = values.get("units", 1), values.get("heads", 1)
        if units % heads:
            raise UserError(f"{model}'s heads is {heads}: expected a divisor of its {units} units")


class CFModel(nnx.Module):
    """A CF model: its logit of an item is user vector . item row + item bias.

    The vector of a position is a function of the items before it and of nothing else, so logits are
    causal by construction and unseen users are like any other; bpr_mf.py says what that means for
    models that know users by id.
    """

    config: Any  # a ModelConfig; of a model that reads no history `history_length` is None
    item_tables: ClassVar[tuple[str, ...]] = ("item_table",)  # that item_tables.py may replace
    item_table: Any = None  # of a trained model an nnx.Param [I, D], read as item_table[...]
    any_width: Any = False  # whether histories may be narrower than `history_length`, to save work
    item_bias: Any = None

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """float32 [B, D] from int32 items, oldest first, left padded; DENSE: the logits [B, I]."""
        raise NotImplementedError

    def items(self) -> CFItems:
        """The item table [I, D] and the bias [I] or None; DENSE for a model without a table."""
        sides = (self.item_table, self.item_bias)
        return CFItems(*(None if side is None else side[...] for side in sides))

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """What a gradient step supervises: all positions of the windows, or the last one alone."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Takes from the training data what needs no gradients; by default nothing."""


class SequenceModel(CFModel):
    """A model whose vector after a position predicts the item that follows."""

    def hidden(self, history_BxS: jax.Array, key: Key = None, last_only: bool = False) -> jax.Array:
        """The vectors after the last Q positions, float32 [B, Q, D]: all S, or only the last one.

        The histories are int32, oldest first, left padded to the config's history_length; the key
        is for dropout, None outside training.
        """
        raise NotImplementedError

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each whole history, float32 [B, D]; an empty history has one too."""
        return self.hidden(history_BxS)[:, -1]

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The vectors of `hidden`, and the items that follow."""
        hidden_BxQxD = self.hidden(windows.history_BxS, key, last_only)
        target_BxQ = windows.target_BxS[:, -hidden_BxQxD.shape[1] :]
        return TrainingQueries(hidden_BxQxD, target_BxQ, self.items())


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """x with a random share of its numbers set to zero, the others scaled; x without a key."""
    if key is None or rate == 0.0:
        return x
    # Bytes are four times cheaper to draw than floats; the rate is exact to 1/256.
    kept = round(256 * (1.0 - rate))
    keep = jax.random.bits(key, x.shape, jnp.uint8) < kept
    return jnp.where(keep, x * (256.0 / kept), 0.0)


def split_key(key: Key, count: int) -> list[Key]:
    """`count` keys of a key; None for each if there is none."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attend(
    query_BxQxD: jax.Array,
    key_BxSxD: jax.Array,
    value_BxSxD: jax.Array,
    allowed_BxQxS: jax.Array,
    config: Any,
    key: Key,
) -> jax.Array:
    """Multi-head attention of projected queries over sources, float32 [B, Q, D].

    `allowed` is bool, or broadcast to it; every query may attend to at least one source. The
    config has `heads`, and `dropout` of the attention weights.
    """

    def split(x):
        return x.reshape(*x.shape[:2], config.heads, -1)

    query_BxQxNxH = split(query_BxQxD)
    query_BxQxNxH /= jnp.sqrt(query_BxQxNxH.shape[-1])
    scores_BxNxQxS = jnp.einsum("bqnh,bsnh->bnqs", query_BxQxNxH, split(key_BxSxD))
    scores_BxNxQxS = jnp.where(allowed_BxQxS[:, None], scores_BxNxQxS, -jnp.inf)
    weights_BxNxQxS = dropout(jax.nn.softmax(scores_BxNxQxS, axis=-1), config.dropout, key)
    attended_BxQxNxH = jnp.einsum("bnqs,bsnh->bqnh", weights_BxNxQxS, split(value_BxSxD))
    return attended_BxQxNxH.reshape(query_BxQxD.shape)


def normal_table(rngs: nnx.Rngs, rows: int, units: int, std: float = 0.02) -> nnx.Param:
    """A table of vectors, normally distributed, float32 [rows, units]."""
    return nnx.Param(std * jax.random.normal(rngs.params(), (rows, units)))


def history_rows(table_IxD: jax.Array, history_BxS: jax.Array) -> jax.Array:
    """The rows of a history's items, float32 [B, S, D]; zeros at padding."""
    rows_BxSxD = table_IxD[jnp.maximum(history_BxS, 0)]
    return jnp.where((history_BxS != PAD_ITEM)[:, :, None], rows_BxSxD, 0.0)


class Statistic(nnx.Variable):
    """A constant, such as `fit_statistics` takes from the training data; saved, never trained."""
