"""Item-item models without training: EASE (arXiv 1905.03375) and ItemKNN (Deshpande and Karypis).

Both have a matrix W of item weights; the logits of a history are the sum of its distinct items'
rows of W. So they are dense, not factorised, and need I x I floats: for catalogues up to a few ten
thousand items. A user is nothing but the history given, so unseen users are like any other.

EASE: W = -P / diag(P) with a zero diagonal, P = (X'X + regularisation)^-1, X the binary users x
items matrix of the training period. ItemKNN: cosine similarities, of which every item keeps those
to its `neighbours` nearest.

Axis letters: B batch, S positions of a history, I items, U users.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tca4rec_jax.cf.models.base import CFModel, ModelConfig, Statistic
from tca4rec_jax.cf.windows import user_item_pairs
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.ranges import Count, NotNegative, Positive

_USERS_AT_ONCE = 1024


@dataclass(frozen=True)
class EASEConfig(ModelConfig):
    """The settings of EASE.

    Attributes:
      regularisation: added to the diagonal of X'X; larger is smoother.
    """

    regularisation: Positive = 250.0


@dataclass(frozen=True)
class ItemKNNConfig(ModelConfig):
    """The settings of ItemKNN.

    Attributes:
      neighbours: kept per item.
      regularisation: added to the denominator of the cosine (shrinkage).
    """

    neighbours: Count = 100
    regularisation: NotNegative = 10.0


class ItemItem(CFModel):
    """Logits are sums of rows of W; subclasses say how W comes from the co-occurrences."""

    def __init__(self, config: EASEConfig | ItemKNNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.weights = Statistic(jnp.zeros((0, config.num_items)))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Computes W; the whole training of these models."""
        together_IxI = co_occurrences(sequences, self.config.num_items)
        self.weights = Statistic(jnp.asarray(self.item_weights(together_IxI), jnp.float32))

    def item_weights(self, together_IxI: np.ndarray) -> np.ndarray:
        """W, float64 [I, I], from the co-occurrences X'X."""
        raise NotImplementedError

    def user_vectors(self, history_BxS: jax.Array) -> jax.Array:
        """The logits of all items for each history, float32 [B, I]; zero for an empty one."""
        weights_IxI = self.weights[...]

        def add(logits_BxI, items):
            item_B, counts_B = items
            return logits_BxI + weights_IxI[item_B] * counts_B[:, None], None

        S = history_BxS.shape[1]
        same_BxSxS = history_BxS[:, :, None] == history_BxS[:, None, :]
        earlier_SxS = np.tri(S, k=-1, dtype=bool)
        counts_BxS = ~jnp.any(same_BxSxS & earlier_SxS[None], axis=2) & (history_BxS != PAD_ITEM)
        none_BxI = jnp.zeros((len(history_BxS), self.config.num_items))
        return jax.lax.scan(add, none_BxI, (jnp.maximum(history_BxS, 0).T, counts_BxS.T))[0]


class EASE(ItemItem):
    """See the module's docstring."""

    def item_weights(self, together_IxI: np.ndarray) -> np.ndarray:
        """W, float64 [I, I]; the diagonal of X'X is overwritten."""
        diagonal = np.diag_indices_from(together_IxI)
        together_IxI[diagonal] += self.config.regularisation
        inverse_IxI = np.linalg.inv(together_IxI)
        weights_IxI = -inverse_IxI / np.diag(inverse_IxI)[None, :]
        weights_IxI[diagonal] = 0.0
        return weights_IxI


class ItemKNN(ItemItem):
    """See the module's docstring."""

    def item_weights(self, together_IxI: np.ndarray) -> np.ndarray:
        """W, float64 [I, I]: a column has the neighbours of the item that is scored."""
        norm_I = np.sqrt(np.diag(together_IxI))
        shrink = self.config.regularisation
        cosine_IxI = together_IxI / (norm_I[:, None] * norm_I[None, :] + shrink + 1e-12)
        np.fill_diagonal(cosine_IxI, 0.0)
        count = min(self.config.neighbours, len(norm_I))
        least_I = -np.partition(-cosine_IxI, count - 1, axis=0)[count - 1]
        return np.where(cosine_IxI >= least_I[None, :], cosine_IxI, 0.0)


def co_occurrences(sequences: ItemSequences, num_items: int) -> np.ndarray:
    """X'X: how many users had both items, float64 [I, I]."""
    user_E, item_E = user_item_pairs(sequences)
    together_IxI = np.zeros((num_items, num_items))
    for first in range(0, int(user_E[-1]) + 1, _USERS_AT_ONCE):
        start, stop = np.searchsorted(user_E, [first, first + _USERS_AT_ONCE])
        x_UxI = np.zeros((_USERS_AT_ONCE, num_items), np.float32)
        x_UxI[user_E[start:stop] - first, item_E[start:stop]] = 1.0
        together_IxI += x_UxI.T @ x_UxI
    return together_IxI
