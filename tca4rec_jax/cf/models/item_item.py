"""Item-item models without training: EASE (arXiv 1905.03375) and ItemKNN (Deshpande and Karypis).

Both have a matrix W of item weights; the logits of a history are the sum of its distinct items'
rows of W. So they are dense, not factorised, and need I x I floats: for catalogues up to a few ten
thousand items. A user is nothing but the history given, so unseen users are like any other.

EASE: W = -P / diag(P) with a zero diagonal, P = (X'X + regularisation)^-1, X the binary users x
items matrix of the training period. ItemKNN: cosine similarities, of which every item keeps those
to its `neighbours` nearest.

Axis letters: B batch, S positions of a history, I items, U users, C some items (columns).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import scipy.sparse
from flax import nnx
from scipy.linalg import lapack

from tca4rec_jax.cf.models.base import CFModel, ModelConfig, Statistic
from tca4rec_jax.cf.windows import user_item_pairs
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, NotNegative, Positive

_ITEMS_AT_ONCE = 512


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

    bytes_per_pair: int  # of memory that `fit_statistics` takes for each pair of items

    def __init__(self, config: EASEConfig | ItemKNNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.weights = Statistic(jnp.zeros((0, config.num_items)))

    def fit_statistics(self, sequences: ItemSequences) -> None:
        """Computes W; the whole training of these models.

        Raises UserError, before any work, if the memory that is free is too little.
        """
        check_memory(type(self).__name__, self.config.num_items, self.bytes_per_pair)
        weights_IxI = self.item_weights(users_by_items(sequences, self.config.num_items))
        self.weights = Statistic(jnp.asarray(weights_IxI))

    def item_weights(self, x_UxI: scipy.sparse.csr_array) -> np.ndarray:
        """W, float32 [I, I], from X."""
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

    bytes_per_pair = 12  # X'X in float64, which its inverse overwrites; W

    def item_weights(self, x_UxI: scipy.sparse.csr_array) -> np.ndarray:
        """W, float32 [I, I]."""
        num_items = x_UxI.shape[1]
        together_IxI = np.empty((num_items, num_items), order="F")
        for columns, together_IxC in co_occurrences(x_UxI):
            together_IxI[:, columns] = together_IxC
        diagonal = np.diag_indices(num_items)
        together_IxI[diagonal] += self.config.regularisation
        lu_IxI, pivots_I, _ = lapack.dgetrf(together_IxI, overwrite_a=True)
        room = 64 * num_items  # for blocks of 64 columns; all else happens in place
        inverse_IxI, _ = lapack.dgetri(lu_IxI, pivots_I, lwork=room, overwrite_lu=True)
        inverse_IxI /= -inverse_IxI[diagonal]
        inverse_IxI[diagonal] = 0.0
        return inverse_IxI.astype(np.float32, order="C")


class ItemKNN(ItemItem):
    """See the module's docstring."""

    bytes_per_pair = 8  # W on the host and on its device

    def item_weights(self, x_UxI: scipy.sparse.csr_array) -> np.ndarray:
        """W, float32 [I, I]: a column has the neighbours of the item that is scored."""
        num_items = x_UxI.shape[1]
        norm_I = np.sqrt(x_UxI.sum(axis=0))
        count = min(self.config.neighbours, num_items)
        weights_IxI = np.empty((num_items, num_items), np.float32)
        for columns, together_IxC in co_occurrences(x_UxI):
            norms_IxC = norm_I[:, None] * norm_I[None, columns]
            cosine_IxC = together_IxC / (norms_IxC + self.config.regularisation + 1e-12)
            cosine_IxC[np.arange(num_items)[columns], np.arange(cosine_IxC.shape[1])] = 0.0
            least_C = -np.partition(-cosine_IxC, count - 1, axis=0)[count - 1]
            weights_IxI[:, columns] = np.where(cosine_IxC >= least_C, cosine_IxC, 0.0)
        return weights_IxI


def users_by_items(sequences: ItemSequences, num_items: int) -> scipy.sparse.csr_array:
    """X, float64 [U, I]: 1 where a user had an item."""
    user_E, item_E = user_item_pairs(sequences)
    shape = int(user_E[-1]) + 1, num_items
    return scipy.sparse.csr_array((np.ones(len(user_E)), (user_E, item_E)), shape)


def co_occurrences(x_UxI: scipy.sparse.csr_array) -> Iterator[tuple[slice, np.ndarray]]:
    """X'X, how many users had both items, some columns at a time: (which, float64 [I, C])."""
    x_IxU, columns_UxI = x_UxI.T.tocsr(), x_UxI.tocsc()
    for start in range(0, x_UxI.shape[1], _ITEMS_AT_ONCE):
        columns = slice(start, start + _ITEMS_AT_ONCE)
        yield columns, (x_IxU @ columns_UxI[:, columns].tocsr()).toarray()


def check_memory(model: str, num_items: int, bytes_per_pair: int) -> None:
    """Raises UserError if less memory is free than a matrix of all pairs of items takes."""
    needed, free = bytes_per_pair * num_items**2, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{model} of {num_items:,} items takes {needed / 1e9:.1f} GB of memory (a weight for "
            f"each pair of items), {free / 1e9:.1f} GB are free: give a cf.model with vectors, "
            "such as sasrec or bpr_mf"
        )
