"""BPR-MF: matrix factorisation trained by Bayesian personalised ranking (arXiv 1205.2618).

A user and an item are a vector each; the logit is their inner product plus an item bias. A history
is folded in: its user vector is the mean of its items' vectors, times the factor that best maps
such means (of all items of a training user) onto the trained user vectors (least squares).

Axis letters: B batch, S positions of a history, I items, D width, U users, E (user, item) pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models import base
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries, user_item_pairs
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.ranges import Count


@dataclass(frozen=True)
class BPRMFConfig(base.ModelConfig):
    """The architecture of a factorisation.

    Attributes:
      num_users: training users U.
      units: width D.
    """

    num_users: Count
    units: Count = 64


class UserItemModel(base.CFModel):
    """A model with a vector per training user and item, trained on their (user, item) pairs.

    Logits never use a training user's own vector: it has seen the user's future, and under a global
    chronological split most later users have none. Histories are folded in instead.
    """

    def __init__(self, config: BPRMFConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.user_table = base.normal_table(rngs, config.num_users, config.units, std=0.1)
        self.item_table = base.normal_table(rngs, config.num_items, config.units, std=0.1)
        self.pair_user, self.pair_item = (base.Statistic(jnp.zeros(0, jnp.int32)) for _ in range(2))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Keeps the distinct (user, item) pairs."""
        pairs = (jnp.asarray(part_E) for part_E in user_item_pairs(sequences))
        self.pair_user, self.pair_item = map(base.Statistic, pairs)

    def vectors(self) -> tuple[jax.Array, CFItems]:
        """The vectors of the training users, float32 [U, D], and what `items` gives."""
        return self.user_table[...], super().items()

    def items(self) -> CFItems:
        """The vectors of the items, float32 [I, D], and the bias [I] or None."""
        return self.vectors()[1]

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The user's own vector predicts the item at the position, whatever `last_only` says."""
        users_UxD, items = self.vectors()
        vector_BxD = users_UxD[windows.user_B]
        return TrainingQueries(vector_BxD[:, None], windows.target_BxS[:, -1:], items)


class BPRMF(UserItemModel):
    """The model; see the module's docstring."""

    def __init__(self, config: BPRMFConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.item_bias = nnx.Param(jnp.zeros(config.num_items))

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The folded-in vector of each history, float32 [B, D]; zero for an empty one."""
        sum_BxD = jnp.sum(base.history_rows(self.item_table[...], history_BxS), axis=1)
        count_Bx1 = jnp.maximum(jnp.sum(history_BxS != PAD_ITEM, axis=1, keepdims=True), 1)
        return self._factor() * sum_BxD / count_Bx1

    def _factor(self) -> jax.Array:
        user_E, U = self.pair_user[...], self.config.num_users
        sums_UxD = jax.ops.segment_sum(self.item_table[...][self.pair_item[...]], user_E, U)
        mean_UxD = sums_UxD / jnp.maximum(jnp.bincount(user_E, length=U), 1)[:, None]
        aligned = jnp.sum(mean_UxD * self.user_table[...])
        return aligned / jnp.maximum(jnp.sum(mean_UxD**2), 1e-12)
