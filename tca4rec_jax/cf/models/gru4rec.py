"""GRU4Rec: recurrent session-based recommendation (Hidasi et al., arXiv 1511.06939).

Gated recurrent units over the item history; a history's user vector is a linear map of the last
state. Input and output share one item table (the 'constrained embedding' of its authors'
later code). Trained with BPR by default, one of the two ranking losses of the paper; the negatives
are uniform instead of the other items of the mini-batch.

Axis letters: B batch, S positions of a history, I items, D width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.models.base import Key
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.ranges import Count, Rate


@dataclass(frozen=True)
class GRU4RecConfig(base.ModelConfig):
    """The architecture of a GRU4Rec model.

    Attributes:
      units: width D of the embeddings and the states.
      layers: recurrent layers.
      dropout: probability, applied to the input and between the layers.
    """

    units: Count = 64
    layers: Count = 1
    dropout: Rate = 0.3


class GRULayer(nnx.Module):
    """One layer of gated recurrent units; a padding position leaves the state as it is."""

    def __init__(self, units: int, *, rngs: nnx.Rngs):
        initializer = nnx.initializers.lecun_uniform()
        self.input = nnx.Linear(units, 3 * units, kernel_init=initializer, rngs=rngs)
        self.recurrent = nnx.Linear(units, 3 * units, kernel_init=initializer, rngs=rngs)

    def __call__(self, x_BxSxD: jax.Array, real_BxS: jax.Array) -> jax.Array:
        """The states after every position, float32 [B, S, D]."""

        def step(state_BxD, inputs):
            gates_Bx3D, real_B = inputs
            input_3 = jnp.split(gates_Bx3D, 3, axis=-1)
            state_3 = jnp.split(self.recurrent(state_BxD), 3, axis=-1)
            reset_BxD = jax.nn.sigmoid(input_3[0] + state_3[0])
            update_BxD = jax.nn.sigmoid(input_3[1] + state_3[1])
            candidate_BxD = jnp.tanh(input_3[2] + reset_BxD * state_3[2])
            new_BxD = (1.0 - update_BxD) * candidate_BxD + update_BxD * state_BxD
            state_BxD = jnp.where(real_B[:, None], new_BxD, state_BxD)
            return state_BxD, state_BxD

        first_BxD = jnp.zeros_like(x_BxSxD[:, 0])
        inputs = (jnp.swapaxes(self.input(x_BxSxD), 0, 1), real_BxS.T)
        return jnp.swapaxes(jax.lax.scan(step, first_BxD, inputs)[1], 0, 1)


class GRU4Rec(base.SequenceModel):
    """The model; see the module's docstring."""

    any_width = True

    def __init__(self, config: GRU4RecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_table = base.normal_table(rngs, config.num_items, config.units)
        self.layers = nnx.List([GRULayer(config.units, rngs=rngs) for _ in range(config.layers)])
        self.output = nnx.Linear(config.units, config.units, rngs=rngs)

    def hidden(self, history_BxS: jax.Array, key: Key = None, last_only: bool = False) -> jax.Array:
        """The vectors after every position, or after the last one alone, float32 [B, Q, D]."""
        keys = base.split_key(key, len(self.layers))
        real_BxS = history_BxS != PAD_ITEM
        x_BxSxD = self.item_table[...][jnp.maximum(history_BxS, 0)]
        for layer, layer_key in zip(self.layers, keys, strict=True):
            x_BxSxD = layer(base.dropout(x_BxSxD, self.config.dropout, layer_key), real_BxS)
        hidden_BxSxD = self.output(x_BxSxD)
        return hidden_BxSxD[:, -1:] if last_only else hidden_BxSxD
