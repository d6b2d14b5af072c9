"""What a CF model is, and what the models share: tables, attention, dropout, statistics.

Axis letters: B batch, S positions of a history, Q those that ask, I items, D width, N heads, H head
dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import ItemSequences


class CFModel(nnx.Module):
    """A CF model: its logit of an item is user vector . item row + item bias.

    The vector of a position is a function of the items before it and of nothing else, so logits are
    causal by construction and unseen users are like any other; bpr_mf.py and lightgcn.py say what
    that means for models that know users by id.

    Attributes:
      config: a frozen dataclass with `num_items`, perhaps `num_users`, `history_length` (None: it
        reads no history), and fields with a default, which are the user's.
    """

    config: Any

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """float32 [B, D] from int32 items, oldest first, left padded with PAD_ITEM.

        Of a model without an item table: the logits of all items, [B, I].
        """
        raise NotImplementedError

    def items(self) -> CFItems:
        """The item table [I, D] and the bias [I] or None; DENSE for a model without a table."""
        raise NotImplementedError

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """What a gradient step supervises: all positions of the windows, or the last one alone."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Takes from the training data what needs no gradients; by default nothing."""


class Dropout(nnx.Module):
    """Inverted dropout whose randomness is an argument, so that the module has no state."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x with a random share of its numbers set to zero; x itself without a key."""
        if key is None or self.rate == 0.0:
            return x
        # Bytes are four times cheaper to draw than floats; the rate is exact to 1/256.
        kept = round(256 * (1.0 - self.rate))
        keep = jax.random.bits(key, x.shape, jnp.uint8) < kept
        return jnp.where(keep, x * (256.0 / kept), 0.0)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys of a key; None for each if there is none."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def attend(
    query_BxQxD: jax.Array,
    key_BxSxD: jax.Array,
    value_BxSxD: jax.Array,
    allowed_BxQxS: jax.Array,
    heads: int,
    dropout: Dropout,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Multi-head attention of queries over sources, float32 [B, Q, D].

    Args:
      query_BxQxD, key_BxSxD, value_BxSxD: projected, float32.
      allowed_BxQxS: bool, or broadcast to it; every query may attend to at least one source.
      heads: must divide D.
      dropout, dropout_key: of the attention weights.
    """

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    query_BxQxNxH = split(query_BxQxD)
    query_BxQxNxH /= jnp.sqrt(query_BxQxNxH.shape[-1])
    scores_BxNxQxS = jnp.einsum("bqnh,bsnh->bnqs", query_BxQxNxH, split(key_BxSxD))
    scores_BxNxQxS = jnp.where(allowed_BxQxS[:, None], scores_BxNxQxS, -jnp.inf)
    weights_BxNxQxS = dropout(jax.nn.softmax(scores_BxNxQxS, axis=-1), dropout_key)
    attended_BxQxNxH = jnp.einsum("bnqs,bsnh->bqnh", weights_BxNxQxS, split(value_BxSxD))
    return attended_BxQxNxH.reshape(query_BxQxD.shape)


def normal_table(rngs: nnx.Rngs, std: float, rows: int, units: int) -> nnx.Param:
    """A table of vectors, normally distributed, float32 [rows, units]."""
    return nnx.Param(std * jax.random.normal(rngs.params(), (rows, units)))


class Statistic(nnx.Variable):
    """A constant that `fit_statistics` takes from the training data; saved, never trained."""
