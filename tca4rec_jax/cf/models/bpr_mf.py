"""BPR-MF: matrix factorisation trained by Bayesian personalised ranking (arXiv 1205.2618).

A user and an item are a vector each; the logit is their inner product plus an item bias.

**Users of the logits.** Training learns a vector per training user, but logits never use it: it has
seen the user's future, and under a global chronological split most later users have none. A history
is folded in instead: its user vector is the mean of its items' vectors, times the factor that best
maps such means (of all items of a training user) onto the trained user vectors (least squares).

Axis letters: B batch, S positions of a history, I items, D width, U users, E (user, item) pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Statistic, normal_table
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries, user_item_pairs
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences

INITIAL_STD = 0.1


@dataclass(frozen=True)
class BPRMFConfig:
    """The architecture of a factorisation.

    Attributes:
      num_items: catalogue size I.
      num_users: training users U.
      history_length: how many items of a history are folded in.
      units: width D.
    """

    num_items: int
    num_users: int
    history_length: int
    units: int = 64


class BPRMF(CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: BPRMFConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.user_table = normal_table(rngs, INITIAL_STD, config.num_users, config.units)
        self.item_table = normal_table(rngs, INITIAL_STD, config.num_items, config.units)
        self.item_bias = nnx.Param(jnp.zeros(config.num_items))
        self.pair_user, self.pair_item = (Statistic(jnp.zeros(0, jnp.int32)) for _ in range(2))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Keeps the (user, item) pairs that the factor of the folding in is made of."""
        pairs = (jnp.asarray(part_E) for part_E in user_item_pairs(sequences))
        self.pair_user, self.pair_item = map(Statistic, pairs)

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The folded-in vector of each history, float32 [B, D]; zero for an empty one."""
        real_BxS = history_BxS != PAD_ITEM
        item_BxSxD = self.item_table[...][jnp.maximum(history_BxS, 0)] * real_BxS[:, :, None]
        count_Bx1 = jnp.maximum(jnp.sum(real_BxS, axis=1, keepdims=True), 1)
        return self._factor() * jnp.sum(item_BxSxD, axis=1) / count_Bx1

    def _factor(self) -> jax.Array:
        user_E, U = self.pair_user[...], self.config.num_users
        sums_UxD = jax.ops.segment_sum(self.item_table[...][self.pair_item[...]], user_E, U)
        mean_UxD = sums_UxD / jnp.maximum(jnp.bincount(user_E, length=U), 1)[:, None]
        aligned = jnp.sum(mean_UxD * self.user_table[...])
        return aligned / jnp.maximum(jnp.sum(mean_UxD**2), 1e-12)

    def known_user_vectors(self) -> jax.Array:
        """The trained vectors of the training users, float32 [U, D]."""
        return self.user_table[...]

    def items(self) -> CFItems:
        """The item table, float32 [I, D], and the bias, float32 [I]."""
        return CFItems(self.item_table[...], self.item_bias[...])

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The user's own vector predicts the item at the position, whatever `last_only` says."""
        vector_BxD = self.user_table[...][windows.user_B]
        return TrainingQueries(vector_BxD[:, None], windows.target_BxS[:, -1:], self.items())
