"""HSTU: hierarchical sequential transduction units (Zhai et al., arXiv 2402.17152, section 3.2).

A causal stack over item histories whose attention has no softmax. One projection of the normalised
input gives gate, values, queries and keys, and

    U, V, Q, K = split(SiLU(f1(norm(X))))
    Y = X + f2(norm(SiLU(Q K' + bias) V / n) * U)

where the bias depends on the distance of two positions and n is the history length. So a weight
counts how often something matched, instead of comparing the matches. A history's user vector is
the output at its last position and the CF logit its cosine with the item's embedding over a
temperature, both as in the authors' code. That code trains with sampled items, and where times are
known their distances have a bias too; here the loss is the trainer's, and windows have no times.

Axis letters: B batch, S positions of a history, Q those that are asked for, N heads, H head width,
I items, D model.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.models.base import Key
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.ranges import Count, Rate, Temperature

_EPSILON = 1e-6


@dataclass(frozen=True)
class HSTUConfig(base.ModelConfig):
    """The architecture of an HSTU model.

    Attributes:
      units: width D.
      blocks: units of the paper.
      heads: attention heads; must divide `units`.
      dropout: probability, applied to the input and to what each block adds.
      temperature: of the cosines.
    """

    units: Count = 64
    blocks: Count = 2
    heads: Count = 1
    dropout: Rate = 0.2
    temperature: Temperature = 0.05


class Block(nnx.Module):
    """One unit: gated pointwise attention with a residual."""

    def __init__(self, config: HSTUConfig, *, rngs: nnx.Rngs):
        D, normal = config.units, nnx.initializers.normal(0.02)
        self.config = config
        self.projection = nnx.Linear(D, 4 * D, use_bias=False, kernel_init=normal, rngs=rngs)
        self.distance_bias = nnx.Param(normal(rngs.params(), (config.history_length,)))
        initializer = nnx.initializers.xavier_uniform()
        self.output = nnx.Linear(D, D, kernel_init=initializer, rngs=rngs)

    def __call__(
        self, x_BxSxD: jax.Array, real_BxS: jax.Array, key: Key, last_only: bool
    ) -> jax.Array:
        """The outputs at the Q wanted positions: all of them, or the last one alone."""

        def heads(x):
            return x.reshape(*x.shape[:2], self.config.heads, -1)

        projected_BxSx4D = jax.nn.silu(self.projection(_layer_norm(x_BxSxD)))
        gate_BxSxD, *rest = jnp.split(projected_BxSx4D, 4, axis=-1)
        value_BxSxNxH, query_BxSxNxH, key_BxSxNxH = map(heads, rest)
        position_S, wanted = jnp.arange(x_BxSxD.shape[1]), slice(-1 if last_only else None, None)
        distance_QxS = position_S[wanted, None] - position_S[None, :]
        bias_QxS = self.distance_bias[...][jnp.maximum(distance_QxS, 0)]
        scores_BxNxQxS = jnp.einsum("bqnh,bsnh->bnqs", query_BxSxNxH[:, wanted], key_BxSxNxH)
        weights_BxNxQxS = jax.nn.silu(scores_BxNxQxS + bias_QxS[None, None])
        allowed_BxQxS = (distance_QxS >= 0)[None] & real_BxS[:, None, :]
        weights_BxNxQxS = jnp.where(allowed_BxQxS[:, None], weights_BxNxQxS, 0.0)
        attended_BxQxNxH = jnp.einsum("bnqs,bsnh->bqnh", weights_BxNxQxS, value_BxSxNxH)
        attended_BxQxD = attended_BxQxNxH.reshape(*attended_BxQxNxH.shape[:2], -1)
        attended_BxQxD = _layer_norm(attended_BxQxD / self.config.history_length)
        gated_BxQxD = base.dropout(attended_BxQxD * gate_BxSxD[:, wanted], self.config.dropout, key)
        return x_BxSxD[:, wanted] + self.output(gated_BxQxD)


class HSTU(base.SequenceModel):
    """The model; see the module's docstring."""

    any_width = True

    def __init__(self, config: HSTUConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_table = base.normal_table(rngs, config.num_items, config.units)
        self.position_table = base.normal_table(rngs, config.history_length, config.units)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.blocks)])

    def hidden(self, history_BxS: jax.Array, key: Key = None, last_only: bool = False) -> jax.Array:
        """The vectors after every position, or after the last one alone, float32 [B, Q, D]."""
        keys = base.split_key(key, 1 + len(self.blocks))
        x_BxQxD = base.history_rows(self.item_table[...], history_BxS)
        position_SxD = self.position_table[...][-history_BxS.shape[1] :]
        x_BxQxD = x_BxQxD * jnp.sqrt(self.config.units) + position_SxD[None]
        x_BxQxD = base.dropout(x_BxQxD, self.config.dropout, keys[0])
        for number, block in enumerate(self.blocks, start=1):
            last_alone = last_only and number == len(self.blocks)
            x_BxQxD = block(x_BxQxD, history_BxS != PAD_ITEM, keys[number], last_alone)
        return _unit(x_BxQxD) / self.config.temperature

    def items(self) -> CFItems:
        """The embeddings of the items at length one, float32 [I, D]."""
        return CFItems(_unit(self.item_table[...]))


def _layer_norm(x: jax.Array) -> jax.Array:
    """x at mean 0 and variance 1; a vector of zeros stays one."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)


def _unit(x: jax.Array) -> jax.Array:
    """x at length one."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPSILON)
