"""SASRec: self-attentive sequential recommendation (Kang and McAuley, arXiv 1808.09781).

A causal transformer over item histories. A history's user vector is the output at its last
position; the CF logit of an item is the inner product of the user vector with the item's row of
the embedding table (one table for inputs and outputs, without a row for padding).

The blocks are those of the original: the query is layer-normed, key and value are not, the residual
comes from the normed query, the feed-forward is as wide as the model. Two things differ: padding
is masked out of the attention, and histories may be empty (`mask_padding`).

Axis letters: B batch, S positions of a history, Q those that are asked for, I items, D model.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Dropout, attend, normal_table, split_key
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.errors import UserError

NORM_EPSILON = 1e-8
INITIAL_STD = 0.02


@dataclass(frozen=True)
class SASRecConfig:
    """The architecture of a SASRec model.

    Attributes:
      num_items: catalogue size I.
      history_length: longest history S the model reads.
      units: width D.
      blocks: transformer blocks.
      heads: attention heads; must divide `units`.
      dropout: probability, applied to the input, the attention weights and the feed-forward.
      mask_padding: False does as the published PyTorch code: padding positions are zeroed after
        every block, but attended to. It matters only for histories shorter than history_length.
    """

    num_items: int
    history_length: int
    units: int = 64
    blocks: int = 2
    heads: int = 1
    dropout: float = 0.5
    mask_padding: bool = True

    def __post_init__(self):
        for name in ("num_items", "history_length", "units", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"SASRec: {name} must be at least 1, got {getattr(self, name)}")
        if self.units % self.heads:
            raise UserError(f"SASRec: {self.heads} heads do not divide {self.units} units")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"SASRec: dropout must be in [0, 1), got {self.dropout}")


class Block(nnx.Module):
    """One block: causal self-attention, then a point-wise feed-forward."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        units = config.units

        def linear():
            return nnx.Linear(
                units, units, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs
            )

        self.heads = config.heads
        self.attention_norm = nnx.LayerNorm(units, epsilon=NORM_EPSILON, rngs=rngs)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.feed_forward_norm = nnx.LayerNorm(units, epsilon=NORM_EPSILON, rngs=rngs)
        self.inner, self.outer = linear(), linear()
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        x_BxSxD: jax.Array,
        allowed_BxSxS: jax.Array,
        key: jax.Array | None,
        *,
        last_only: bool = False,
    ) -> jax.Array:
        """The outputs at the Q wanted positions: all of them, or the last one alone."""
        keys = split_key(key, 3)
        wanted = slice(-1, None) if last_only else slice(None)
        normed_BxQxD = self.attention_norm(x_BxSxD[:, wanted])
        projected = self.query(normed_BxQxD), self.key(x_BxSxD), self.value(x_BxSxD)
        allowed_BxQxS = allowed_BxSxS[:, wanted]
        attended_BxQxD = attend(*projected, allowed_BxQxS, self.heads, self.dropout, keys[0])
        normed_BxQxD = self.feed_forward_norm(normed_BxQxD + attended_BxQxD)
        inner_BxQxD = self.dropout(jax.nn.relu(self.inner(normed_BxQxD)), keys[1])
        return normed_BxQxD + self.dropout(self.outer(inner_BxQxD), keys[2])


class SASRec(CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_table = normal_table(rngs, INITIAL_STD, config.num_items, config.units)
        self.position_table = normal_table(rngs, INITIAL_STD, config.history_length, config.units)
        self.dropout = Dropout(config.dropout)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.blocks)])
        self.final_norm = nnx.LayerNorm(config.units, epsilon=NORM_EPSILON, rngs=rngs)

    def hidden(
        self,
        history_BxS: jax.Array,
        dropout_key: jax.Array | None = None,
        *,
        last_only: bool = False,
    ) -> jax.Array:
        """Outputs at every position, float32 [B, S, D]; position s has seen items 0..s.

        Args:
          history_BxS: int32 item indices, oldest first, left padded with PAD_ITEM; S is the
            config's history_length.
          dropout_key: a PRNG key in training, None otherwise.
          last_only: the last block computes its last position alone; the result is [B, 1, D].
        """
        keys = split_key(dropout_key, 1 + len(self.blocks))
        real_BxS = history_BxS != PAD_ITEM
        x_BxSxD = self.item_table[...][jnp.maximum(history_BxS, 0)] * jnp.sqrt(self.config.units)
        x_BxSxD = jnp.where(real_BxS[:, :, None], x_BxSxD, 0.0) + self.position_table[...][None]
        x_BxSxD = self.dropout(x_BxSxD, keys[0])
        mask_padding = self.config.mask_padding
        allowed_BxSxS = _allowed(real_BxS if mask_padding else jnp.ones_like(real_BxS))
        *earlier, final = zip(self.blocks, keys[1:], strict=True)

        def masked(x_BxQxD):
            if mask_padding:
                return x_BxQxD
            return jnp.where(real_BxS[:, -x_BxQxD.shape[1] :, None], x_BxQxD, 0.0)

        for block, key in earlier:
            x_BxSxD = block(masked(x_BxSxD), allowed_BxSxS, key)
        block, key = final
        x_BxQxD = block(masked(x_BxSxD), allowed_BxSxS, key, last_only=last_only)
        return self.final_norm(masked(x_BxQxD))

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each whole history, float32 [B, D]; an empty history has one too."""
        return self.hidden(history_BxS)[:, -1]

    def items(self) -> CFItems:
        """The table of the inner products, float32 [I, D]; no bias."""
        return CFItems(self.item_table[...])

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """Every position predicts the item after it; with `last_only` the last one alone."""
        hidden_BxQxD = self.hidden(windows.history_BxS, key, last_only=last_only)
        target_BxQ = windows.target_BxS[:, -hidden_BxQxD.shape[1] :]
        return TrainingQueries(hidden_BxQxD, target_BxQ, self.items())


def _allowed(real_BxS: jax.Array) -> jax.Array:
    """Which keys a query may attend to, bool [B, S, S]: earlier items, and always itself.

    A padding position attends to itself only so that no row of the softmax is empty; for an empty
    history that makes the user vector a learnt constant.
    """
    S = real_BxS.shape[1]
    causal_SxS = jnp.tril(jnp.ones((S, S), bool))
    return (causal_SxS[None] & real_BxS[:, None, :]) | jnp.eye(S, dtype=bool)[None]
