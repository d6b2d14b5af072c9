"""BERT4Rec: bidirectional transformer trained by the Cloze task (Sun et al., arXiv 1904.06690).

A history is followed by the token [mask]; the user vector is the output there, after the paper's
output layer (linear, GELU, layer norm). Input and output share one item table; items have a bias.
In training a share of the items of a window, its target included, is masked and predicted from both
sides; in half of the windows only the target is, which is the task at hand (the paper mixes such
samples in too).

Only earlier items ever stand in the input of a user vector, so it is causal although the attention
is not.

Axis letters: B batch, S positions of a history, L = S + 1 positions with the target's, P masked
positions, I items, D width.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.models.base import Key
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.ranges import Count, Rate, Share

_INITIALIZER = nnx.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class BERT4RecConfig(base.ModelConfig):
    """The architecture of a BERT4Rec model.

    Attributes:
      units: width D.
      blocks: transformer blocks.
      heads: attention heads; must divide `units`.
      dropout: probability, applied to the input, the attention and the feed-forward.
      masked: share of a window's positions that the Cloze task masks.
    """

    units: Count = 64
    blocks: Count = 2
    heads: Count = 2
    dropout: Rate = 0.1
    masked: Share = 0.3


class Block(nnx.Module):
    """Self-attention, then a feed-forward four times as wide; layer norms after the residuals."""

    def __init__(self, config: BERT4RecConfig, *, rngs: nnx.Rngs):
        D = config.units
        linear = functools.partial(nnx.Linear, kernel_init=_INITIALIZER, rngs=rngs)
        self.config = config
        self.query, self.key, self.value = linear(D, D), linear(D, D), linear(D, D)
        self.attended = linear(D, D)
        self.attention_norm = nnx.LayerNorm(D, rngs=rngs)
        self.inner, self.outer = linear(D, 4 * D), linear(4 * D, D)
        self.feed_forward_norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, key: Key) -> jax.Array:
        """The outputs, float32 [B, L, D]; `real_BxL` is False at padding, `key` is for dropout."""
        keys, rate = base.split_key(key, 3), self.config.dropout
        projected = self.query(x_BxLxD), self.key(x_BxLxD), self.value(x_BxLxD)
        attended_BxLxD = base.attend(*projected, real_BxL[:, None, :], self.config, keys[0])
        attended_BxLxD = base.dropout(self.attended(attended_BxLxD), rate, keys[1])
        x_BxLxD = self.attention_norm(x_BxLxD + attended_BxLxD)
        forward_BxLxD = self.outer(jax.nn.gelu(self.inner(x_BxLxD)))
        return self.feed_forward_norm(x_BxLxD + base.dropout(forward_BxLxD, rate, keys[2]))


class BERT4Rec(base.CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: BERT4RecConfig, *, rngs: nnx.Rngs):
        self.config = config

        def table(rows):
            return nnx.Param(_INITIALIZER(rngs.params(), (rows, config.units)))

        self.item_table, self.mask_vector = table(config.num_items), table(1)
        self.position_table = table(config.history_length + 1)
        self.item_bias = nnx.Param(jnp.zeros(config.num_items))
        self.input_norm = nnx.LayerNorm(config.units, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.blocks)])
        self.output = nnx.Linear(config.units, config.units, kernel_init=_INITIALIZER, rngs=rngs)
        self.output_norm = nnx.LayerNorm(config.units, rngs=rngs)

    def hidden(self, items_BxL: jax.Array, masked_BxL: jax.Array, key: Key = None) -> jax.Array:
        """Outputs at every position, float32 [B, L, D]; the key is for dropout, in training.

        Items are int32, left padded with PAD_ITEM; those where `masked` is True have no effect.
        """
        keys = base.split_key(key, 1 + len(self.blocks))
        x_BxLxD = self.item_table[...][jnp.maximum(items_BxL, 0)]
        x_BxLxD = jnp.where(masked_BxL[:, :, None], self.mask_vector[...][None], x_BxLxD)
        x_BxLxD = self.input_norm(x_BxLxD + self.position_table[...][None])
        x_BxLxD = base.dropout(x_BxLxD, self.config.dropout, keys[0])
        real_BxL = (items_BxL != PAD_ITEM) | masked_BxL
        for number, block in enumerate(self.blocks, start=1):
            x_BxLxD = block(x_BxLxD, real_BxL, keys[number])
        return x_BxLxD

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each whole history, float32 [B, D]; an empty history has one too."""
        items_BxL = jnp.pad(history_BxS, ((0, 0), (0, 1)), constant_values=PAD_ITEM)
        masked_BxL = jnp.zeros(items_BxL.shape, bool).at[:, -1].set(True)
        return self._head(self.hidden(items_BxL, masked_BxL)[:, -1])

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The masked positions, or with `last_only` the target alone, predict their items."""
        dropout_key, mask_key = jax.random.split(key)
        items_BxL = jnp.concatenate([windows.history_BxS, windows.target_BxS[:, -1:]], axis=1)
        share = 0.0 if last_only else self.config.masked
        position_BxP, chosen_BxP = _masked_positions(items_BxL, mask_key, share)
        at_BxPxL = position_BxP[:, :, None] == jnp.arange(items_BxL.shape[1])[None, None, :]
        masked_BxL = jnp.any(at_BxPxL & chosen_BxP[:, :, None], axis=1)
        hidden_BxLxD = self.hidden(items_BxL, masked_BxL, dropout_key)
        hidden_BxPxD = jnp.take_along_axis(hidden_BxLxD, position_BxP[:, :, None], axis=1)
        target_BxP = jnp.take_along_axis(items_BxL, position_BxP, axis=1)
        target_BxP = jnp.where(chosen_BxP, target_BxP, PAD_ITEM)
        return TrainingQueries(self._head(hidden_BxPxD), target_BxP, self.items())

    def _head(self, hidden):
        return self.output_norm(jax.nn.gelu(self.output(hidden)))


def _masked_positions(items_BxL, key, share):
    """Which positions are masked: indices int32 [B, P] and whether each is used, bool [B, P].

    P is a fixed number. In about half of the windows a random choice of P real positions is masked,
    in the others (in all of them if the share is 0) only the last.
    """
    B, L = items_BxL.shape
    P = max(1, round(share * L))
    order_key, half_key = jax.random.split(key)
    last_BxL = jnp.broadcast_to((jnp.arange(L) == L - 1)[None], (B, L))
    cloze_Bx1 = jax.random.bernoulli(half_key, 0.5 if share else 0.0, (B, 1))
    wanted_BxL = jnp.where(cloze_Bx1, items_BxL != PAD_ITEM, last_BxL)
    draw_BxL = jnp.where(wanted_BxL, jax.random.uniform(order_key, (B, L)), -1.0)
    drawn_BxP, position_BxP = jax.lax.top_k(draw_BxL, P)
    return position_BxP, drawn_BxP >= 0.0
