"""LightGCN: matrix factorisation smoothed over the interaction graph (arXiv 2002.02126).

Users and items are the nodes of a graph. A layer replaces every vector by the sum of its
neighbours' over sqrt(degree x degree); a node's final vector is the mean of all layers, the logit
the inner product of two. Trained with BPR.

**Users of the logits.** As in BPR-MF, logits never use a training user's own vector: it has seen
the user's future, and later users have none. A history is a new user node attached to its items,
whose own first vector is zero: the sum, over its items and all layers but the last, of the items'
vectors in that layer over sqrt(history length x item degree), divided by the number of layers. That
is what the model's own layers compute for such a node, but for its effect on others.

Axis letters: B batch, S positions of a history, I items, D width, U users, E (user, item) pairs.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, Statistic, normal_table
from tca4rec_jax.cf.windows import HistoryWindows, TrainingQueries, user_item_pairs
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences

INITIAL_STD = 0.1


@dataclass(frozen=True)
class LightGCNConfig:
    """The architecture of a LightGCN model.

    Attributes:
      num_items: catalogue size I.
      num_users: training users U.
      history_length: how many items of a history are attached to a new user.
      units: width D.
      layers: layers of propagation.
    """

    num_items: int
    num_users: int
    history_length: int
    units: int = 64
    layers: int = 3


class LightGCN(CFModel):
    """The model; see the module's docstring."""

    def __init__(self, config: LightGCNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.user_table = normal_table(rngs, INITIAL_STD, config.num_users, config.units)
        self.item_table = normal_table(rngs, INITIAL_STD, config.num_items, config.units)
        self.pair_user, self.pair_item = (Statistic(jnp.zeros(0, jnp.int32)) for _ in range(2))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Keeps the edges of the training graph."""
        pairs = (jnp.asarray(part_E) for part_E in user_item_pairs(sequences))
        self.pair_user, self.pair_item = map(Statistic, pairs)

    def _layers(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """User vectors [U, D] and item vectors [I, D] of every layer, the first included."""
        user_E, item_E = self.pair_user[...], self.pair_item[...]
        num_users, num_items = self.config.num_users, self.config.num_items
        of_user_E = _inverse_root(user_E, num_users)[user_E]
        scale_Ex1 = (of_user_E * _inverse_root(item_E, num_items)[item_E])[:, None]
        users, items = [self.user_table[...]], [self.item_table[...]]
        for _ in range(self.config.layers):
            to_user = jax.ops.segment_sum(
                scale_Ex1 * items[-1][item_E], user_E, num_users, indices_are_sorted=True
            )
            to_item = jax.ops.segment_sum(scale_Ex1 * users[-1][user_E], item_E, num_items)
            users.append(to_user)
            items.append(to_item)
        return users, items

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each history as a new user, float32 [B, D]; zero for an empty one."""
        _, items = self._layers()
        degree_root_I = _inverse_root(self.pair_item[...], self.config.num_items)
        message_IxD = degree_root_I[:, None] * _sum(items[:-1]) / len(items)
        real_BxS = history_BxS != PAD_ITEM
        sum_BxD = jnp.sum(message_IxD[jnp.maximum(history_BxS, 0)] * real_BxS[:, :, None], axis=1)
        return sum_BxD / jnp.sqrt(jnp.maximum(jnp.sum(real_BxS, axis=1, keepdims=True), 1))

    def known_user_vectors(self) -> jax.Array:
        """The trained vectors of the training users, float32 [U, D]."""
        users, _ = self._layers()
        return _sum(users) / len(users)

    def items(self) -> CFItems:
        """The mean of the items' layers, float32 [I, D]; no bias."""
        _, items = self._layers()
        return CFItems(_sum(items) / len(items))

    def queries(self, windows: HistoryWindows, last_only: bool, key: jax.Array) -> TrainingQueries:
        """The user's own vector predicts the item at the position, whatever `last_only` says."""
        users, items = self._layers()
        vector_BxD = (_sum(users) / len(users))[windows.user_B]
        table = CFItems(_sum(items) / len(items))
        return TrainingQueries(vector_BxD[:, None], windows.target_BxS[:, -1:], table)


def _sum(layers: list[jax.Array]) -> jax.Array:
    total: Any = sum(layers)
    return total


def _inverse_root(node_E: jax.Array, count: int) -> jax.Array:
    """1 / sqrt(degree) of every node, float32 [count]."""
    return 1.0 / jnp.sqrt(jnp.maximum(jnp.bincount(node_E, length=count), 1).astype(jnp.float32))
