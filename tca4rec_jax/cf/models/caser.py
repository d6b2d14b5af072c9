"""Caser: convolutional sequence embedding (Tang and Wang, WSDM 2018, arXiv 1809.07426).

The history is an image of S item vectors. Horizontal filters of every height 1..S are max-pooled
over time, vertical filters weigh the positions; a linear layer makes the user vector of both.
Items have an output table of their own and a bias, as in the paper.

Two things differ. There is no embedding of the user's id: most users of a global chronological
split are unseen, and an id's embedding has seen the user's future (the paper's ablation without it
is the model here). And the next item alone is the target, not the next three.

Axis letters: B batch, S positions of a history, I items, D width, F horizontal filters of one
height, V vertical filters.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Dropout, normal_table
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM

INITIAL_STD = 0.02


@dataclass(frozen=True)
class CaserConfig:
    """The architecture of a Caser model.

    Attributes:
      num_items: catalogue size I.
      history_length: S, the height of the image.
      units: width D.
      horizontal: filters F of each height.
      vertical: filters V.
      dropout: probability, applied to the filters' outputs.
    """

    num_items: int
    history_length: int
    units: int = 64
    horizontal: int = 16
    vertical: int = 4
    dropout: float = 0.5


class Caser(CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: CaserConfig, *, rngs: nnx.Rngs):
        self.config = config
        S, D = config.history_length, config.units
        self.input_table = normal_table(rngs, INITIAL_STD, config.num_items, D)
        self.output_table = normal_table(rngs, INITIAL_STD, config.num_items, D)
        self.item_bias = nnx.Param(jnp.zeros(config.num_items))
        self.horizontal = nnx.List(
            [nnx.Linear(height * D, config.horizontal, rngs=rngs) for height in range(1, S + 1)]
        )
        self.vertical = nnx.Linear(S, config.vertical, use_bias=False, rngs=rngs)
        filtered = S * config.horizontal + config.vertical * D
        self.output = nnx.Linear(filtered, D, rngs=rngs)
        self.dropout = Dropout(config.dropout)

    def user_vectors(
        self, history_BxS: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """The vector of each whole history, float32 [B, D]; an empty history has one too."""
        B, S = history_BxS.shape
        image_BxSxD = self.input_table[...][jnp.maximum(history_BxS, 0)]
        image_BxSxD = jnp.where((history_BxS != PAD_ITEM)[:, :, None], image_BxSxD, 0.0)
        found = []
        for height, convolution in enumerate(self.horizontal, start=1):
            shifts = [image_BxSxD[:, shift : S - height + 1 + shift] for shift in range(height)]
            strips = jnp.concatenate(shifts, axis=-1)  # [B, S - height + 1, height * D]
            found.append(jnp.max(jax.nn.relu(convolution(strips)), axis=1))
        found.append(self.vertical(jnp.swapaxes(image_BxSxD, 1, 2)).reshape(B, -1))
        return jax.nn.relu(self.output(self.dropout(jnp.concatenate(found, axis=1), dropout_key)))

    def items(self) -> CFItems:
        """The output table, float32 [I, D], and the bias, float32 [I]."""
        return CFItems(self.output_table[...], self.item_bias[...])

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The whole window predicts the item after it, whatever `last_only` says."""
        vector_BxD = self.user_vectors(windows.history_BxS, key)
        return TrainingQueries(vector_BxD[:, None], windows.target_BxS[:, -1:], self.items())
