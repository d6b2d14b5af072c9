"""The losses of CF models, and their sampled negatives.

softmax: cross-entropy over the whole catalogue; its logits are calibrated at temperature 1.
sampled_softmax: the same with the catalogue estimated by sampled items, for large ones.
bce: binary cross-entropy of the target and the mean over sampled negatives.
bpr: -log sigmoid(target - negative), the mean over sampled negatives (arXiv 1205.2618).

Axis letters: B batch, P supervised positions of a row, Q = B x P, C of them, N negatives of each,
I items, D width, W seen items of a row, U users, E (user, item) pairs.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tca4rec_jax.cf.windows import TrainingQueries, user_item_pairs
from tca4rec_jax.core.collaborative_tokenizer import CFItems, cf_logits
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError
from tca4rec_jax.ranges import Count, NotNegative, check_fields

_CHUNK = 128  # positions whose logits are computed at a time
_MOST_LOGITS = 1 << 23  # of a batch, beyond which they are: 32 MB


@dataclass(frozen=True)
class LossConfig:
    """What the training of a CF model supervises; a model's own values are those of its paper.

    Attributes:
      loss: 'softmax' is calibrated at temperature 1; 'sampled_softmax' estimates it, for large
        catalogues; 'bce' and 'bpr' compare the target with sampled negatives.
      negatives: sampled per target ('bce', 'bpr'), or by popularity for all targets of a batch
        together ('sampled_softmax': thousands).
      negatives_outside: drawn uniformly from the items outside the 'window' and its target, or
        outside all training items of the 'user'.
      targets: 'all', every position of a window predicts the next item, and an epoch takes random
        windows until each item was a target about once; 'window', only the end of a window does,
        and an epoch takes the window of every item (slower by a factor of the history length);
        'rows', every item of every row is a target once an epoch: rows are cut into windows, and a
        batch holds windows of like lengths, as many as make up `batch_size` mean ones;
        'last', only the last item of every row is a target, the published protocol.
      regularisation: decoupled weight decay (AdamW's); 0 is Adam.
    """

    loss: Literal["softmax", "sampled_softmax", "bce", "bpr"] = "softmax"
    negatives: Count = 1
    negatives_outside: Literal["window", "user"] = "window"
    targets: Literal["all", "window", "rows", "last"] = "all"
    regularisation: NotNegative = 0.0

    def __post_init__(self):
        check_fields(self, "the CF model's ")


def softmax_loss(
    queries: TrainingQueries, target_BxP: jax.Array, supervised_BxP: jax.Array
) -> jax.Array:
    """Cross-entropy over the whole catalogue, summed over the supervised positions, float32 []."""
    vector_QxD = queries.vector_BxPxD.reshape(target_BxP.size, -1)
    target_Q, supervised_Q = target_BxP.reshape(-1), supervised_BxP.reshape(-1)
    table_IxD = queries.items.table_IxD
    if table_IxD is not None and target_Q.size * table_IxD.shape[0] > _MOST_LOGITS:
        return chunked_softmax_loss(vector_QxD, queries.items, target_Q, supervised_Q)
    logits_QxI = cf_logits(vector_QxD, queries.items)
    loss_Q = optax.softmax_cross_entropy_with_integer_labels(logits_QxI, target_Q)
    return jnp.sum(loss_Q.reshape(target_BxP.shape) * supervised_BxP)


@jax.custom_vjp
def chunked_softmax_loss(
    vector_QxD: jax.Array, items: CFItems, target_Q: jax.Array, supervised_Q: jax.Array
) -> jax.Array:
    """The sum of `softmax_loss`, without logits of all positions or any of unsupervised ones.

    A few positions at a time, while their logits are in the cache, give their loss and its
    gradients, so that no logits are computed twice or kept.
    """
    return _loss_and_gradients(vector_QxD, items, target_Q, supervised_Q)[0]


def _loss_and_gradients(vector_QxD, items, target_Q, supervised_Q):
    """(The loss, its gradients with respect to the vectors and the items)."""
    table_IxD = items.table_IxD
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    order_Q = jnp.argsort(~supervised_Q, stable=True)  # the supervised positions come first
    count = jnp.sum(supervised_Q)

    def add_chunk(number, sums):
        loss, vector_gradient_QxD, (table_gradient_IxD, bias_gradient_I) = sums
        place_C = number * _CHUNK + jnp.arange(_CHUNK)
        row_C = order_Q[jnp.minimum(place_C, order_Q.size - 1)]
        weight_Cx1 = (place_C < count)[:, None].astype(jnp.float32)
        logits_CxI = cf_logits(vector_QxD[row_C], items)
        highest_Cx1 = jnp.max(logits_CxI, axis=1, keepdims=True)
        share_CxI = jnp.exp(logits_CxI - highest_Cx1)
        total_Cx1 = jnp.sum(share_CxI, axis=1, keepdims=True)
        target_Cx1 = target_Q[row_C][:, None]
        target_logit_Cx1 = jnp.take_along_axis(logits_CxI, target_Cx1, axis=1)
        loss += jnp.sum(weight_Cx1 * (jnp.log(total_Cx1) + highest_Cx1 - target_logit_Cx1))
        is_target_CxI = jnp.arange(logits_CxI.shape[1])[None, :] == target_Cx1
        gradient_CxI = weight_Cx1 * (share_CxI / total_Cx1 - is_target_CxI)
        table_gradient_IxD += exact(gradient_CxI.T, vector_QxD[row_C])
        vector_gradient_QxD = vector_gradient_QxD.at[row_C].add(exact(gradient_CxI, table_IxD))
        if bias_gradient_I is not None:
            bias_gradient_I += jnp.sum(gradient_CxI, axis=0)
        return loss, vector_gradient_QxD, CFItems(table_gradient_IxD, bias_gradient_I)

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), vector_QxD, items))
    loss, *gradients = jax.lax.fori_loop(0, -(-count // _CHUNK), add_chunk, zeros)
    return loss, gradients


def _scaled_gradients(gradients, cotangent):
    return *jax.tree.map(lambda gradient: gradient * cotangent, gradients), None, None


chunked_softmax_loss.defvjp(_loss_and_gradients, _scaled_gradients)


def sampled_softmax_loss(
    queries: TrainingQueries,
    target_BxP: jax.Array,
    supervised_BxP: jax.Array,
    drawn_N: jax.Array,
    log_share_I: jax.Array,
) -> jax.Array:
    """`softmax_loss` with the other items estimated by N drawn ones, float32 [].

    A logit is lowered by the logarithm of how often its item is expected among the drawn
    (`log_share_I`, of one draw), so that the sum of the exponentials is that of the catalogue in
    expectation (Bengio and Senécal, 2008; the logQ correction of Yi et al., RecSys 2019). A target
    that is drawn counts once. The gradient is that of `softmax_loss` up to O(1/N) in expectation.
    """
    table_IxD, bias_I = queries.items
    if table_IxD is None:
        raise ValueError("a sampled loss needs item vectors")
    vector_QxD, target_Q = queries.vector_BxPxD.reshape(target_BxP.size, -1), target_BxP.reshape(-1)
    drawn = CFItems(table_IxD[drawn_N], None if bias_I is None else bias_I[drawn_N])
    expected_N = log_share_I[drawn_N] + jnp.log(len(drawn_N))
    z_QxN = cf_logits(vector_QxD, drawn) - expected_N[None, :]
    z_QxN = jnp.where(drawn_N[None, :] == target_Q[:, None], -jnp.inf, z_QxN)
    own_Q = jnp.sum(vector_QxD * table_IxD[target_Q], axis=1)
    own_Q = own_Q if bias_I is None else own_Q + bias_I[target_Q]
    loss_Q = jnp.logaddexp(jax.nn.logsumexp(z_QxN, axis=1), own_Q) - own_Q
    return jnp.sum(loss_Q * supervised_BxP.reshape(-1))


def draw_popular(key: jax.Array, items_n: jax.Array, count: int, num_items: int) -> jax.Array:
    """Items by their number among `items_n`, each given one more, with repetition: int32 [count].

    An item's share of the draws is that of popularity_logits.
    """
    draw_N = jax.random.randint(key, (count,), 0, len(items_n) + num_items)
    return jnp.where(draw_N < len(items_n), items_n[draw_N], draw_N - len(items_n))


def sampled_loss(
    loss: str, queries: TrainingQueries, target_BxP: jax.Array, negative_BxPxN: jax.Array
) -> jax.Array:
    """'bce' or 'bpr' of the target against the negatives, float32 [B, P]."""
    table_IxD, bias_I = queries.items
    if table_IxD is None:
        raise ValueError("a sampled loss needs item vectors")

    def logits(item_BxPxN):
        rows_BxPxNxD = table_IxD[item_BxPxN]
        products = jnp.sum(queries.vector_BxPxD[:, :, None] * rows_BxPxNxD, axis=-1)
        return products if bias_I is None else products + bias_I[item_BxPxN]

    positive_BxPx1, negative_BxPxN = logits(target_BxP[:, :, None]), logits(negative_BxPxN)
    if loss == "bpr":
        return jnp.mean(jax.nn.softplus(negative_BxPxN - positive_BxPx1), axis=-1)
    of_negatives_BxP = jnp.mean(jax.nn.softplus(negative_BxPxN), axis=-1)
    return jax.nn.softplus(-positive_BxPx1[:, :, 0]) + of_negatives_BxP


def window_negatives(key: jax.Array, seen_BxW: jax.Array, count: int, num_items: int) -> jax.Array:
    """Uniform items outside each row of `seen` (PAD_ITEM is ignored), int32 [B, count].

    A number k below the number of unseen items stands for the k-th of them: of the sorted seen
    items, each one not above the number so far moves it up by one.
    """
    sorted_BxW = jnp.sort(seen_BxW, axis=1)
    # A repeated item or padding, which is sorted first, moves nothing: it is set beyond every item.
    other_BxW = jnp.diff(sorted_BxW, axis=1, prepend=PAD_ITEM) != 0
    blocked_BxW = jnp.sort(jnp.where(other_BxW, sorted_BxW, num_items), axis=1)
    unseen_B = num_items - jnp.sum(blocked_BxW < num_items, axis=1)
    draw_BxN = jax.random.randint(key, (len(seen_BxW), count), 0, unseen_B[:, None])
    for column in range(seen_BxW.shape[1]):
        draw_BxN = draw_BxN + (draw_BxN >= blocked_BxW[:, column : column + 1])
    return draw_BxN


class SeenByUser(NamedTuple):
    """The distinct items of every training user, for drawing others; int32.

    The gap of an item is its number minus its rank among the user's sorted items: how many unseen
    items are below it.
    """

    gap_E: jax.Array  # users one after the other
    offsets: jax.Array  # [U + 1], where each user's part of `gap_E` begins

    @classmethod
    def of(cls, sequences: ItemSequences, num_items: int) -> "SeenByUser":
        """Raises UserError if some user has seen every item."""
        user_E, item_E = user_item_pairs(sequences)
        counts_U = np.bincount(user_E)
        if counts_U.max() >= num_items:
            raise UserError(
                f"user {int(np.argmax(counts_U))} of the training data has seen all {num_items} "
                "items, so no negative can be sampled; use the loss 'softmax'"
            )
        offsets = np.concatenate([[0], np.cumsum(counts_U)])
        gap_E = item_E - (np.arange(len(item_E)) - offsets[user_E])
        return cls(jnp.asarray(gap_E, jnp.int32), jnp.asarray(offsets, jnp.int32))


def user_negatives(
    key: jax.Array, seen: SeenByUser, user_B: jax.Array, count: int, num_items: int
) -> jax.Array:
    """Uniform items that the users never had in training, int32 [B, count].

    The k-th unseen item is k plus the number of seen items that have at most k unseen ones below
    them, found by bisection.
    """
    ends = start_B, stop_B = seen.offsets[user_B], seen.offsets[user_B + 1]
    unseen_B = num_items - (stop_B - start_B)
    draw_BxN = jax.random.randint(key, (len(user_B), count), 0, unseen_B[:, None])
    low_BxN, high_BxN = (jnp.broadcast_to(end_B[:, None], draw_BxN.shape) for end_B in ends)
    for _ in range(max(num_items.bit_length(), 1)):
        middle_BxN = (low_BxN + high_BxN) // 2
        inside_BxN = low_BxN < high_BxN
        up_BxN = inside_BxN & (seen.gap_E[middle_BxN] <= draw_BxN)
        low_BxN = jnp.where(up_BxN, middle_BxN + 1, low_BxN)
        high_BxN = jnp.where(inside_BxN & ~up_BxN, middle_BxN, high_BxN)
    return draw_BxN + low_BxN - start_B[:, None]
