"""SASRec: self-attentive sequential recommendation (Kang and McAuley, arXiv 1808.09781).

A causal transformer over item histories. A history's user vector is the output at its last
position; the CF logit of an item is the inner product of the user vector with the item's row of
the embedding table (one table for inputs and outputs, without a row for padding).

The blocks are those of the original: the query is layer-normed, key and value are not, the residual
comes from the normed query, the feed-forward is as wide as the model. `norm` has the two variants
of today's PyTorch code. Two things differ: padding is masked out of the attention, and histories
may be empty (`mask_padding`).

Axis letters: B batch, S positions of a history, Q those that are asked for, I items, D model.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.models.base import Key
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.ranges import Count, Rate

NORM_EPSILON = 1e-8


@dataclass(frozen=True)
class SASRecConfig(base.ModelConfig):
    """The architecture of a SASRec model.

    Attributes:
      units: width D.
      blocks: transformer blocks.
      heads: attention heads; must divide `units`.
      dropout: probability, applied to the input, the attention weights and the feed-forward.
      norm: where the layer norms of a block stand. 'original': over the query, which the residual
        keeps, and over the attention's output. 'pre': over what goes into the attention and into
        the feed-forward. 'post': over both sums with the residual.
      mask_padding: False does as the published PyTorch code: padding positions are zero in the
        input (of 'original' after every block, too), but attended to. It matters only for histories
        shorter than history_length.
    """

    units: Count = 64
    blocks: Count = 2
    heads: Count = 1
    dropout: Rate = 0.5
    norm: Literal["original", "pre", "post"] = "original"
    mask_padding: bool = True


class Block(nnx.Module):
    """One block: causal self-attention, then a point-wise feed-forward."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        D, initializer = config.units, nnx.initializers.xavier_uniform()
        linear = functools.partial(nnx.Linear, D, D, kernel_init=initializer, rngs=rngs)
        self.config = config
        self.attention_norm = nnx.LayerNorm(D, epsilon=NORM_EPSILON, rngs=rngs)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.feed_forward_norm = nnx.LayerNorm(D, epsilon=NORM_EPSILON, rngs=rngs)
        self.inner, self.outer = linear(), linear()

    def __call__(
        self, x_BxSxD: jax.Array, allowed_BxSxS: jax.Array, key: Key, last_only: bool
    ) -> jax.Array:
        """The outputs at the Q wanted positions: all of them, or the last one alone."""
        keys, rate, norm = base.split_key(key, 3), self.config.dropout, self.config.norm
        wanted = slice(-1, None) if last_only else slice(None)
        source_BxSxD = self.attention_norm(x_BxSxD) if norm == "pre" else x_BxSxD
        query_BxQxD = source_BxSxD[:, wanted]
        if norm == "original":
            query_BxQxD = self.attention_norm(query_BxQxD)
        projected = self.query(query_BxQxD), self.key(source_BxSxD), self.value(source_BxSxD)
        allowed_BxQxS = allowed_BxSxS[:, wanted]
        attended_BxQxD = base.attend(*projected, allowed_BxQxS, self.config, keys[0])

        def feed_forward(x_BxQxD):
            inner_BxQxD = base.dropout(jax.nn.relu(self.inner(x_BxQxD)), rate, keys[1])
            return base.dropout(self.outer(inner_BxQxD), rate, keys[2])

        if norm == "pre":
            x_BxQxD = x_BxSxD[:, wanted] + attended_BxQxD
            return x_BxQxD + feed_forward(self.feed_forward_norm(x_BxQxD))
        if norm == "post":
            x_BxQxD = self.attention_norm(query_BxQxD + attended_BxQxD)
            return self.feed_forward_norm(x_BxQxD + feed_forward(x_BxQxD))
        x_BxQxD = self.feed_forward_norm(query_BxQxD + attended_BxQxD)
        return x_BxQxD + feed_forward(x_BxQxD)


class SASRec(base.SequenceModel):
    """The model; see the module's docstring."""

    def __init__(self, config: SASRecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_table = base.normal_table(rngs, config.num_items, config.units)
        self.position_table = base.normal_table(rngs, config.history_length, config.units)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.blocks)])
        self.final_norm = nnx.LayerNorm(config.units, epsilon=NORM_EPSILON, rngs=rngs)

    @property
    def any_width(self) -> bool:
        """Whether padding has no effect."""
        return self.config.mask_padding

    def hidden(self, history_BxS: jax.Array, key: Key = None, last_only: bool = False) -> jax.Array:
        """The vectors after every position, or after the last one alone, float32 [B, Q, D]."""
        keys = base.split_key(key, 1 + len(self.blocks))
        real_BxS = history_BxS != PAD_ITEM
        x_BxQxD = self.item_table[...][jnp.maximum(history_BxS, 0)] * jnp.sqrt(self.config.units)
        position_SxD = self.position_table[...][-history_BxS.shape[1] :]
        x_BxQxD = jnp.where(real_BxS[:, :, None], x_BxQxD, 0.0) + position_SxD[None]
        x_BxQxD = base.dropout(x_BxQxD, self.config.dropout, keys[0])
        mask_padding = self.config.mask_padding
        allowed_BxSxS = _allowed(real_BxS if mask_padding else jnp.ones_like(real_BxS))

        def zeroed(x_BxQxD, needed):
            real_BxQ = real_BxS[:, -x_BxQxD.shape[1] :]
            return jnp.where(real_BxQ[:, :, None], x_BxQxD, 0.0) if needed else x_BxQxD

        x_BxQxD = zeroed(x_BxQxD, not mask_padding)
        for number, block in enumerate(self.blocks, start=1):
            last_alone = last_only and number == len(self.blocks)
            x_BxQxD = block(x_BxQxD, allowed_BxSxS, keys[number], last_alone)
            x_BxQxD = zeroed(x_BxQxD, not mask_padding and self.config.norm == "original")
        return self.final_norm(x_BxQxD)


def _allowed(real_BxS: jax.Array) -> jax.Array:
    """Which keys a query may attend to, bool [B, S, S]: earlier items, and always itself.

    So no row of the softmax is empty, and an empty history's user vector is a learnt constant.
    """
    S = real_BxS.shape[1]
    return (jnp.tri(S, dtype=bool)[None] & real_BxS[:, None, :]) | jnp.eye(S, dtype=bool)[None]
