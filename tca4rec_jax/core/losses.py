"""Soft Label Alignment and the soft next-token-prediction objective (TCA4Rec; MSL).

    y_soft = (1 - alpha) * onehot(target token) + alpha * p_cf(. | prefix)
    loss at a position = -log sum_v y_soft(v) P(v)      form 'log_expectation' (the published code)
                       = -sum_v y_soft(v) log P(v)      form 'cross_entropy'   (the paper's text)
    P = softmax(z / tau) over the vocabulary, or over the trie's children (MSL, arXiv 2504.04178)

`tca_loss` is the whole objective: the training step calls it, and so does a step of your own. Pure
functions in float32. They return unreduced sums, so that micro-batches and shards of unequal size
average exactly. Away from decisions p_cf is one-hot, so soft labels are needed at decisions only.

Logits exist for a chunk of positions at a time and are made again in the backward pass.
Axes: core/__init__.py; here N are the supervised positions of all rows and K all decisions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.batching import in_chunks, sum_over
from tca4rec_jax.core import Array
from tca4rec_jax.core.collaborative_tokenizer import CFItems, project
from tca4rec_jax.core.decisions import Targets
from tca4rec_jax.core.objective import Objective
from tca4rec_jax.core.trie import DeviceTrie

_LOGITS_BYTES = 64 << 20  # of the logits that exist at once, by default

Head = Callable[[jax.Array], jax.Array]  # states [n, D] -> float32 logits [n, V]
HeadOf = Callable[[jax.Array | None], Head]  # tokens [U], or None for the vocabulary -> Head


class Moments(NamedTuple):
    """Sums over first decisions of titles, float32: what an adaptive tau follows (MSL)."""

    targets: jax.Array
    target_logits: jax.Array
    tokens: jax.Array
    logits: jax.Array
    squares: jax.Array

    @classmethod
    def of(cls, logits_NxV: jax.Array, labels: "SoftLabels") -> "Moments":
        """Of the children's logits at the decisions where `labels.first` (not None) is true."""
        assert labels.first is not None
        weight_K = jnp.where(labels.first, labels.weight, 0.0)
        z_KxC = logits_NxV[labels.position[:, None], labels.token]
        target_K = jnp.take_along_axis(z_KxC, labels.child[:, None], axis=1)[:, 0]
        weight_KxC = jnp.where(labels.absent, 0.0, weight_K[:, None])
        return cls(
            targets=jnp.sum(weight_K),
            target_logits=jnp.sum(weight_K * target_K),
            tokens=jnp.sum(weight_KxC),
            logits=jnp.sum(weight_KxC * z_KxC),
            squares=jnp.sum(weight_KxC * jnp.square(z_KxC)),
        )


class Loss(NamedTuple):
    """Sums over the supervised positions of a batch, float32; the loss is total / positions."""

    total: jax.Array  # the objective
    positions: jax.Array  # the denominator: supervised positions, or decisions (mean_over)
    nll: jax.Array  # negative log-likelihood of the labels under the same softmax
    titles: jax.Array  # supervised titles
    moments: Moments | None = None  # of the logits, if tau follows them


class SoftLabels(NamedTuple):
    """The decisions of a batch with the CF distribution over their children; padding has weight 0.

    Attributes:
      position: int32 [K], index into the supervised positions of all rows.
      weight: float32 [K].
      child: int32 [K], which child is on the target's path.
      token: int32 [K, C], where the children's tokens are among the logits.
      absent: bool [K, C], where there is no child.
      log_p_cf: float32 [K, C], log p_cf of the children; -inf where there is none.
      first: bool [K], whether it is the first of a title, if tau follows the logits there.
    """

    position: jax.Array
    weight: jax.Array
    child: jax.Array
    token: jax.Array
    absent: jax.Array
    log_p_cf: jax.Array
    first: jax.Array | None = None


def tca_loss(
    states_BxSxD: jax.Array,
    head: HeadOf,
    targets: Targets,
    cf_BxPxD: jax.Array | None,
    cf_items: CFItems | None,
    trie: DeviceTrie,
    objective: Objective,
    *,
    projection: Callable[..., jax.Array] | None = None,
) -> Loss:
    """The soft NTP objective of a batch: projection, soft labels, loss (TCA4Rec; docs/method.md).

    With softmax 'children' logits exist at decisions only, of tokens that some decision chooses
    from; with 'vocabulary' at the supervised positions. The projection is float32 in any case.

    Args:
      states_BxSxD: the LLM's hidden states, any float; [b, s] predicts token s + 1 of row b.
      head: makes logits of states, of the vocabulary or of some tokens: `Decoder.head`; `of_logits`
        if the states are the LLM's logits [B, S, V] themselves.
      targets: what is supervised.
      cf_BxPxD: for every supervised title the CF logits of all items [B, P, I], or user vectors.
      cf_items: the item side of user vectors, DENSE for logits; None leaves the projection out: the
        loss is plain next-token prediction, as with alpha = 0.
      trie: the compressed trie; token by token if the objective rounds.
      projection: in place of `project`: that of items that are sharded, or the published one.

    Raises ValueError for an objective that rounds without a projection that does.
    """
    if objective.rounds and projection is None and cf_items is not None:
        raise ValueError("objective.cf_dtype=bfloat16 needs projection=project_rounded")
    cf = cf_BxPxD, cf_items, projection or project
    labels, objective = _soft_labels(targets, *cf, trie, objective)
    if objective.softmax == "children":
        decided_BxK = jnp.take_along_axis(targets.position, targets.decisions.position, axis=1)
        states_KxD = _states_at(states_BxSxD, decided_BxK)
        sums = children_loss(head(trie.choice), states_KxD, labels, objective)
    else:
        states_NxD = _states_at(states_BxSxD, targets.position)
        label_N, weight_N = jnp.ravel(targets.label), jnp.ravel(targets.weight)
        sums = vocabulary_loss(head(None), states_NxD, label_N, weight_N, labels, objective)
    total, nll, *moments = sums
    total = objective.tau * total if objective.scale_by_tau else total
    counted = targets.weight if objective.mean_over == "positions" else targets.decisions.weight
    return Loss(total, jnp.sum(counted), nll, jnp.sum(targets.title_weight), *moments)


def of_logits(tokens_U: jax.Array | None) -> Head:
    """The head of a model whose states are its logits [n, V], any float."""
    return lambda logits_NxV: (
        logits_NxV if tokens_U is None else jnp.take(logits_NxV, tokens_U, axis=1)
    ).astype(jnp.float32)


def _soft_labels(
    targets: Targets, cf_BxPxD, cf_items, project: Callable, trie: DeviceTrie, objective: Objective
) -> tuple[SoftLabels, Objective]:
    """The decisions of all rows with their CF distributions; alpha is 0 where there are none."""
    decisions = targets.decisions
    rows, positions = targets.position.shape
    titles = targets.title_weight.shape[1]
    row_Bx1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
    node_K = jnp.ravel(decisions.node)
    child_KxC, is_child_KxC = trie.children(node_K)
    if cf_items is None:
        objective = dataclasses.replace(objective, alpha=0.0)
        log_p_cf_KxC = jnp.where(is_child_KxC, 0.0, -jnp.inf)
    else:
        pair_K = jnp.ravel(decisions.title + titles * row_Bx1)
        cf_PxD = cf_BxPxD.reshape(rows * titles, -1)
        log_p_cf_KxC = project(cf_PxD, cf_items, pair_K, node_K, trie, objective.beta)
    token_N = trie.choice_index if objective.softmax == "children" else trie.token
    labels = SoftLabels(
        position=jnp.ravel(decisions.position + positions * row_Bx1),
        weight=jnp.ravel(decisions.weight),
        child=jnp.ravel(decisions.child),
        token=token_N[child_KxC],
        absent=~is_child_KxC,
        log_p_cf=log_p_cf_KxC,
        first=node_K == trie.sizes.first_decision if objective.adapts else None,
    )
    return labels, objective


def _states_at(states_BxSxD: jax.Array, position_BxN: Array) -> jax.Array:
    """States at positions of each row, flat: [B * N, D]."""
    states = jnp.take_along_axis(states_BxSxD, position_BxN[:, :, None], axis=1)
    return states.reshape(-1, states.shape[-1])


def soft_label_loss(
    z_KxC: jax.Array, log_normaliser_K: jax.Array, labels: SoftLabels, objective: Objective
) -> jax.Array:
    """The loss of each decision, float32 [K].

    `z_KxC` are float32 LLM logits over tau of the children's tokens, finite, `log_normaliser_K` the
    log of the softmax denominator over the allowed set (V or the children).
    """
    alpha = objective.alpha
    is_label_KxC = jnp.arange(z_KxC.shape[1])[None, :] == labels.child[:, None]
    log_p_KxC = z_KxC - log_normaliser_K[:, None]
    if objective.form == "cross_entropy":
        y_KxC = (1.0 - alpha) * is_label_KxC + alpha * jnp.exp(labels.log_p_cf)
        return -jnp.sum(y_KxC * log_p_KxC, axis=-1)
    log_onehot_KxC = jnp.where(is_label_KxC, 0.0, -jnp.inf)
    log_y_KxC = jnp.logaddexp(
        jnp.log1p(-jnp.asarray(alpha, jnp.float32)) + log_onehot_KxC,
        jnp.log(jnp.asarray(alpha, jnp.float32)) + labels.log_p_cf,
    )
    return -jax.nn.logsumexp(jax.lax.stop_gradient(log_y_KxC) + log_p_KxC, axis=-1)


def vocabulary_loss_of_logits(
    logits_NxV: jax.Array,
    label_N: jax.Array,
    weight_N: jax.Array,
    labels: SoftLabels,
    objective: Objective,
) -> tuple[jax.Array, jax.Array]:
    """Soft NTP with the softmax over the whole vocabulary (BIGRec and LLaRA style).

    Takes float32 logits, int32 next tokens and float32 weights of positions, and the decisions
    among these. Returns the sums (objective, plain negative log-likelihood at tau).
    """
    z_NxV = logits_NxV / objective.tau
    log_normaliser_N = jax.nn.logsumexp(z_NxV, axis=-1)
    z_label_N = jnp.take_along_axis(z_NxV, label_N[:, None], axis=-1)[:, 0]
    nll_N = log_normaliser_N - z_label_N
    z_KxC = z_NxV[labels.position[:, None], labels.token]
    soft_K = soft_label_loss(z_KxC, log_normaliser_N[labels.position], labels, objective)
    # A decision's soft loss takes the place of its plain one.
    swapped = jnp.sum(labels.weight * (soft_K - nll_N[labels.position]))
    nll = jnp.sum(weight_N * nll_N)
    return nll + swapped, nll


def children_loss_of_logits(
    logits_NxV: jax.Array, labels: SoftLabels, objective: Objective
) -> tuple[jax.Array, jax.Array]:
    """Soft NTP with the softmax over the trie's children (MSL, arXiv 2504.04178).

    Forced positions have loss and gradient 0, so logits (float32) are needed at decisions only; the
    forced positions still count in the denominator (the caller's). Returns the sums (objective,
    negative log-likelihood over the children at tau).
    """
    z_KxC = logits_NxV[labels.position[:, None], labels.token] / objective.tau
    log_normaliser_K = jax.nn.logsumexp(z_KxC, axis=-1, where=~labels.absent)
    soft_K = soft_label_loss(z_KxC, log_normaliser_K, labels, objective)
    z_label_K = jnp.take_along_axis(z_KxC, labels.child[:, None], axis=-1)[:, 0]
    total = jnp.sum(labels.weight * soft_K)
    return total, jnp.sum(labels.weight * (log_normaliser_K - z_label_K))


def children_loss(
    head: Head,
    states_KxD: jax.Array,
    labels: SoftLabels,
    objective: Objective,
    *,
    chunk: int | None = None,
) -> tuple:
    """`children_loss_of_logits` of head(states), with the logits of `chunk` decisions at a time.

    Third come the Moments, if labels.first says where. `head` may know only the tokens that
    decisions choose from: labels.token counts in its last axis. The states are those before the
    decisions, in order. By default a chunk is what fits 64 MiB of logits.
    """
    chunk = chunk or _default_chunk(head, states_KxD)

    def loss(states_kxD, labels):
        labels = labels._replace(position=jnp.arange(states_kxD.shape[0]))
        logits_kxU = head(states_kxD)
        sums = children_loss_of_logits(logits_kxU, labels, objective)
        return sums if labels.first is None else (*sums, Moments.of(logits_kxU, labels))

    if states_KxD.shape[0] <= chunk:
        return loss(states_KxD, labels)
    # Padded with zeros: no weight, and no child is absent, so that no softmax is empty.
    xs = jax.tree.map(lambda a: in_chunks(a, chunk), (states_KxD, labels))
    return sum_over(jax.checkpoint(loss), xs)


def vocabulary_loss(
    head: Head,
    states_NxD: jax.Array,
    label_N: jax.Array,
    weight_N: jax.Array,
    labels: SoftLabels,
    objective: Objective,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`vocabulary_loss_of_logits` of head(states), with the logits of `chunk` positions at a time.

    No two decisions with a weight may share a position.
    """
    chunk = chunk or _default_chunk(head, states_NxD)

    def loss(states_nxD, label_n, weight_n, first):
        # The decisions of these positions follow one another: there are at most `chunk`.
        start = jnp.searchsorted(labels.position, first)
        local = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk), labels)
        position = local.position - first
        local = local._replace(
            position=jnp.minimum(position, chunk - 1),
            weight=jnp.where(position < chunk, local.weight, 0.0),
        )
        return vocabulary_loss_of_logits(head(states_nxD), label_n, weight_n, local, objective)

    size = states_NxD.shape[0]
    if size <= chunk:
        return vocabulary_loss_of_logits(head(states_NxD), label_N, weight_N, labels, objective)
    labels = _sorted_by_position(labels, size, padding=chunk)
    xs = jax.tree.map(lambda a: in_chunks(a, chunk), (states_NxD, label_N, weight_N))
    return sum_over(jax.checkpoint(loss), (*xs, chunk * jnp.arange(xs[0].shape[0])))


def _default_chunk(head: Head, states_NxD: jax.Array) -> int:
    row = jax.ShapeDtypeStruct((1, states_NxD.shape[1]), states_NxD.dtype)
    return max(8, _LOGITS_BYTES // (4 * jax.eval_shape(head, row).shape[1]) // 8 * 8)


def _sorted_by_position(labels: SoftLabels, size: int, padding: int) -> SoftLabels:
    """Labels by ascending position, those without weight last, and `padding` more of these."""
    position_K = jnp.where(labels.weight > 0, labels.position, size)
    order_K = jnp.argsort(position_K)

    def arrange(array, fill=0):
        widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array[order_K], widths, constant_values=fill)

    arranged = jax.tree.map(arrange, labels)
    return arranged._replace(position=arrange(position_K, fill=size))
