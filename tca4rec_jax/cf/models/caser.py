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

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.models.base import Key
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.ranges import Count, Rate


@dataclass(frozen=True)
class CaserConfig(base.ModelConfig):
    """The architecture of a Caser model; S is the height of the image.

    Attributes:
      units: width D.
      horizontal: filters F of each height.
      vertical: filters V.
      dropout: probability, applied to the filters' outputs.
    """

    units: Count = 64
    horizontal: Count = 16
    vertical: Count = 4
    dropout: Rate = 0.5


class Caser(base.SequenceModel):
    """The model; see the module's docstring."""

    item_tables = ("input_table", "output_table")

    def __init__(self, config: CaserConfig, *, rngs: nnx.Rngs):
        self.config = config
        S, D = config.history_length, config.units
        self.input_table = base.normal_table(rngs, config.num_items, D)
        self.output_table = base.normal_table(rngs, config.num_items, D)
        self.item_bias = nnx.Param(jnp.zeros(config.num_items))
        self.horizontal = nnx.List(
            [nnx.Linear(height * D, config.horizontal, rngs=rngs) for height in range(1, S + 1)]
        )
        self.vertical = nnx.Linear(S, config.vertical, use_bias=False, rngs=rngs)
        filtered = S * config.horizontal + config.vertical * D
        self.output = nnx.Linear(filtered, D, rngs=rngs)

    def hidden(self, history_BxS: jax.Array, key: Key = None, last_only: bool = False) -> jax.Array:
        """The vector of each whole history, float32 [B, 1, D], whatever `last_only` says."""
        B, S = history_BxS.shape
        image_BxSxD = base.history_rows(self.input_table[...], history_BxS)
        found = []
        for height, convolution in enumerate(self.horizontal, start=1):
            shifts = [image_BxSxD[:, shift : S - height + 1 + shift] for shift in range(height)]
            strips = jnp.concatenate(shifts, axis=-1)  # [B, S - height + 1, height * D]
            found.append(jnp.max(jax.nn.relu(convolution(strips)), axis=1))
        found.append(self.vertical(jnp.swapaxes(image_BxSxD, 1, 2)).reshape(B, -1))
        found_BxF = base.dropout(jnp.concatenate(found, axis=1), self.config.dropout, key)
        return jax.nn.relu(self.output(found_BxF))[:, None]

    def items(self) -> CFItems:
        """The output table, float32 [I, D], and the bias, float32 [I]."""
        return CFItems(self.output_table[...], self.item_bias[...])
