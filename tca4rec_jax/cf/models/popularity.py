"""Most popular: every user is given the items by their number of interactions.

The baseline any recommender must beat. Its CF logit is the logarithm of an item's smoothed share of
the interactions, so a softmax at temperature 1 gives the shares back.

Axis letters: B batch, S positions of a history, I items.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Statistic
from tca4rec_jax.cf.scoring import check_items
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import ItemSequences
from tca4rec_jax.ranges import Count


@dataclass(frozen=True)
class PopularityConfig:
    """The catalogue has I items, and no history is read."""

    num_items: Count
    history_length: ClassVar[None] = None


class Popularity(CFModel):
    """Most popular as a CF model: no user vector worth the name, all in the item bias."""

    def __init__(self, config: PopularityConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.item_bias = Statistic(jnp.zeros(config.num_items))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Counts the training interactions."""
        self.item_bias = Statistic(jnp.asarray(popularity_logits(sequences, self.config.num_items)))

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """Zeros, float32 [B, 1]."""
        return jnp.zeros((len(history_BxS), 1))

    def items(self) -> CFItems:
        """Zeros, float32 [I, 1], and the logits as the bias, float32 [I]."""
        return CFItems(jnp.zeros((self.config.num_items, 1)), self.item_bias[...])


def popularity_logits(sequences: ItemSequences, num_items: int) -> np.ndarray:
    """log((count + 1) / sum(count + 1)) of every item, float32 [I]; finite for items never seen.

    Raises UserError for an item outside the catalogue.
    """
    check_items(sequences, num_items)
    count_I = np.bincount(sequences.items, minlength=num_items) + 1.0
    return np.log(count_I / count_I.sum()).astype(np.float32)
