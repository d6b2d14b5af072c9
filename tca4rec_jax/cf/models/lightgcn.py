"""LightGCN: matrix factorisation smoothed over the interaction graph (arXiv 2002.02126).

Users and items are the nodes of a graph. A layer replaces every vector by the sum of its
neighbours' over sqrt(degree x degree); a node's final vector is the mean of all layers, the logit
the inner product of two. Trained with BPR.

A history is folded in as a new user node attached to its items, whose own first vector is zero: the
sum, over its items and all layers but the last, of the items' vectors in that layer over
sqrt(history length x item degree), divided by the number of layers. That is what the model's own
layers compute for such a node, but for its effect on others.

Axis letters: B batch, S positions of a history, I items, D width, U users, E (user, item) pairs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tca4rec_jax.cf.models.base import history_rows
from tca4rec_jax.cf.models.bpr_mf import BPRMFConfig, UserItemModel
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.data.sequences import PAD_ITEM
from tca4rec_jax.ranges import Natural


@dataclass(frozen=True)
class LightGCNConfig(BPRMFConfig):
    """The architecture of a LightGCN model.

    Attributes:
      units: width D.
      layers: layers of propagation.
    """

    layers: Natural = 3


class LightGCN(UserItemModel):
    """The model; see the module's docstring."""

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
            users, items = [*users, to_user], [*items, to_item]
        return users, items

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The vector of each history as a new user, float32 [B, D]; zero for an empty one."""
        _, items = self._layers()
        degree_root_I = _inverse_root(self.pair_item[...], self.config.num_items)
        message_IxD = degree_root_I[:, None] * _sum(items[:-1]) / len(items)
        sum_BxD = jnp.sum(history_rows(message_IxD, history_BxS), axis=1)
        count_Bx1 = jnp.sum(history_BxS != PAD_ITEM, axis=1, keepdims=True)
        return sum_BxD / jnp.sqrt(jnp.maximum(count_Bx1, 1))

    def vectors(self) -> tuple[jax.Array, CFItems]:
        """The means of the users' layers [U, D] and of the items' [I, D], float32; no bias."""
        users, items = self._layers()
        return _sum(users) / len(users), CFItems(_sum(items) / len(items))


def _sum(layers: list[jax.Array]) -> jax.Array:
    return sum(layers, jnp.zeros(()))


def _inverse_root(node_E: jax.Array, count: int) -> jax.Array:
    """1 / sqrt(degree) of every node, float32 [count]."""
    return 1.0 / jnp.sqrt(jnp.maximum(jnp.bincount(node_E, length=count), 1).astype(jnp.float32))
