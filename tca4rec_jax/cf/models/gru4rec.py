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

from tca4rec_jax.cf.models.base import CFModel, Dropout, normal_table, split_key
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM

INITIAL_STD = 0.02


@dataclass(frozen=True)
class GRU4RecConfig:
    """The architecture of a GRU4Rec model.

    Attributes:
      num_items: catalogue size I.
      history_length: longest history S the model reads.
      units: width D of the embeddings and the states.
      layers: recurrent layers.
      dropout: probability, applied to the input and between the layers.
    """

    num_items: int
    history_length: int
    units: int = 64
    layers: int = 1
    dropout: float = 0.3


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


class GRU4Rec(CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: GRU4RecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_table = normal_table(rngs, INITIAL_STD, config.num_items, config.units)
        self.layers = nnx.List([GRULayer(config.units, rngs=rngs) for _ in range(config.layers)])
        self.output = nnx.Linear(config.units, config.units, rngs=rngs)
        self.dropout = Dropout(config.dropout)

    def hidden(self, history_BxS: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Outputs at every position, float32 [B, S, D]; position s has seen items 0..s."""
        keys = split_key(dropout_key, len(self.layers))
        real_BxS = history_BxS != PAD_ITEM
        x_BxSxD = self.item_table[...][jnp.maximum(history_BxS, 0)]
        for layer, key in zip(self.layers, keys, strict=True):
            x_BxSxD = layer(self.dropout(x_BxSxD, key), real_BxS)
        return self.output(x_BxSxD)

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each whole history, float32 [B, D]; an empty history has one too."""
        return self.hidden(history_BxS)[:, -1]

    def items(self) -> CFItems:
        """The table of the inner products, float32 [I, D]; no bias."""
        return CFItems(self.item_table[...])

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """Every position predicts the item after it; with `last_only` the last one alone."""
        hidden_BxSxD, target_BxS = self.hidden(windows.history_BxS, key), windows.target_BxS
        if last_only:
            hidden_BxSxD, target_BxS = hidden_BxSxD[:, -1:], target_BxS[:, -1:]
        return TrainingQueries(hidden_BxSxD, target_BxS, self.items())
