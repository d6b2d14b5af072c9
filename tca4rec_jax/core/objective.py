"""Soft Label Alignment and the soft next-token-prediction objective (TCA4Rec; MSL).

Pure functions in float32.  They return unreduced sums, so that micro-batches and shards of unequal
size average exactly.

A *position* is a place in a sequence whose next token is supervised; a *decision* is a position at
which the trie node of the prefix has several children. Everywhere else the title is forced: p_cf is
one-hot there, so a soft label is needed at decisions only.

The losses take vocabulary logits, or hidden states and the head that makes logits of them: then
logits exist for a chunk of positions at a time and are made again in the backward pass.

`title_loss` is the whole objective for a training step of your own, one target a row.

Axis letters: N supervised positions, K decisions, V vocabulary (or a part of it), C children of a
decision, D model or CF width, B rows, T title tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tca4rec_jax.core.collaborative_tokenizer import (
    DENSE,
    CFItems,
    PaddedDecisions,
    TrieArrays,
    TrieShape,
    project,
)
from tca4rec_jax.errors import UserError

FORMS = ("log_expectation", "cross_entropy")
SOFTMAXES = ("vocabulary", "children")

_LOGITS_BYTES = 64 << 20  # of the logits that exist at once, by default

Head = Callable[[jax.Array], jax.Array]  # hidden [n, D] -> float32 logits [n, V]


class Loss(NamedTuple):
    """Sums over the supervised positions of a batch, float32; the loss is total / positions."""

    total: jax.Array  # the objective
    positions: jax.Array  # supervised positions, the denominator
    nll: jax.Array  # negative log-likelihood of the labels under the same softmax
    titles: jax.Array  # supervised titles


class Decisions(NamedTuple):
    """The decisions of a batch; padding has weight 0 and points at the root's first child."""

    position_K: jax.Array  # int32, index into the supervised positions
    weight_K: jax.Array  # float32, 0 for padding
    label_child_K: jax.Array  # int32, which child is on the target's path
    child_token_KxC: jax.Array  # int32, where the children's tokens are among the logits
    log_p_cf_KxC: jax.Array  # float32, from child_log_probs; -inf where there is no child


def validate_objective(alpha: float, beta: float, tau: float, form: str, softmax: str) -> None:
    """Raises ValueError naming the field of the objective that is out of range."""
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"objective.alpha is {alpha}: it mixes two distributions, give 0 to 1")
    for name, value in (("beta", beta), ("tau", tau)):
        if not value > 0.0:
            raise UserError(f"objective.{name} is {value}: a temperature must be above 0")
    if form not in FORMS:
        raise UserError(f"objective.form is {form!r}: expected one of {FORMS}")
    if softmax not in SOFTMAXES:
        raise UserError(f"objective.softmax is {softmax!r}: expected one of {SOFTMAXES}")


def soft_label_loss(
    z_KxC: jax.Array,
    log_normaliser_K: jax.Array,
    label_child_K: jax.Array,
    log_p_cf_KxC: jax.Array,
    alpha: jax.Array | float,
    form: str,
) -> jax.Array:
    """Loss of each decision against y_soft = (1 - alpha) onehot + alpha p_cf (method.md).

    Args:
      z_KxC: float32 LLM logits over tau of the children's tokens, finite.
      log_normaliser_K: log of the softmax denominator over the allowed set (V or the children).
      label_child_K: int32, which child is on the target's path.
      log_p_cf_KxC: float32 from the Collaborative Tokenizer; -inf where there is no child.
      alpha: 0 to 1, may be traced.
      form: 'log_expectation' (-log sum y P, the published code) or 'cross_entropy' (-sum y log P).

    Returns:
      float32 [K].
    """
    is_label_KxC = jnp.arange(z_KxC.shape[1])[None, :] == label_child_K[:, None]
    log_p_KxC = z_KxC - log_normaliser_K[:, None]
    if form == "cross_entropy":
        y_KxC = (1.0 - alpha) * is_label_KxC + alpha * jnp.exp(log_p_cf_KxC)
        return -jnp.sum(y_KxC * log_p_KxC, axis=-1)
    log_onehot_KxC = jnp.where(is_label_KxC, 0.0, -jnp.inf)
    log_y_KxC = jnp.logaddexp(
        jnp.log1p(-jnp.asarray(alpha, jnp.float32)) + log_onehot_KxC,
        jnp.log(jnp.asarray(alpha, jnp.float32)) + log_p_cf_KxC,
    )
    return -jax.nn.logsumexp(jax.lax.stop_gradient(log_y_KxC) + log_p_KxC, axis=-1)


def vocabulary_loss(
    logits_NxV: jax.Array,
    label_N: jax.Array,
    weight_N: jax.Array,
    decision: Decisions,
    alpha: jax.Array | float,
    tau: jax.Array | float,
    form: str,
) -> tuple[jax.Array, jax.Array]:
    """Soft NTP with the softmax over the whole vocabulary (BIGRec and LLaRA style).

    Args:
      logits_NxV: float32 LLM logits at the supervised positions.
      label_N: int32 next token; weight_N: float32, 0 for padding.
      decision: the decisions among the N positions.

    Returns:
      (sum of the objective, sum of the plain negative log-likelihood at tau).
    """
    z_NxV = logits_NxV / tau
    log_normaliser_N = jax.nn.logsumexp(z_NxV, axis=-1)
    z_label_N = jnp.take_along_axis(z_NxV, label_N[:, None], axis=-1)[:, 0]
    nll_N = log_normaliser_N - z_label_N
    soft_K = soft_label_loss(
        z_NxV[decision.position_K[:, None], decision.child_token_KxC],
        log_normaliser_N[decision.position_K],
        decision.label_child_K,
        decision.log_p_cf_KxC,
        alpha,
        form,
    )
    # A decision's soft loss takes the place of its plain one.
    swapped = jnp.sum(decision.weight_K * (soft_K - nll_N[decision.position_K]))
    nll = jnp.sum(weight_N * nll_N)
    return nll + swapped, nll


def children_loss(
    logits_NxV: jax.Array,
    decision: Decisions,
    alpha: jax.Array | float,
    tau: jax.Array | float,
    form: str,
) -> tuple[jax.Array, jax.Array]:
    """Soft NTP with the softmax over the trie's children (MSL, arXiv 2504.04178).

    Forced positions have loss and gradient 0, so logits are needed at decisions only; the forced
    positions still count in the denominator (the caller's).

    Args:
      logits_NxV: float32 LLM logits at the supervised positions.
      decision: the decisions among the N positions.

    Returns:
      (sum of the objective, sum of the negative log-likelihood over the children at tau).
    """
    z_KxC = logits_NxV[decision.position_K[:, None], decision.child_token_KxC] / tau
    is_child_KxC = decision.log_p_cf_KxC > -jnp.inf
    log_normaliser_K = jax.nn.logsumexp(z_KxC, axis=-1, where=is_child_KxC)
    soft_K = soft_label_loss(
        z_KxC, log_normaliser_K, decision.label_child_K, decision.log_p_cf_KxC, alpha, form
    )
    z_label_K = jnp.take_along_axis(z_KxC, decision.label_child_K[:, None], axis=-1)[:, 0]
    total = jnp.sum(decision.weight_K * soft_K)
    return total, jnp.sum(decision.weight_K * (log_normaliser_K - z_label_K))


def title_loss(
    logits_BxTxV: jax.Array,
    label_BxT: jax.Array,
    weight_BxT: jax.Array,
    cf_BxD: jax.Array,
    titles: PaddedDecisions,
    trie: TrieArrays,
    shape: TrieShape,
    *,
    alpha: jax.Array | float,
    beta: jax.Array | float = 1.0,
    tau: jax.Array | float = 1.0,
    form: str = "log_expectation",
    softmax: str = "vocabulary",
    items: CFItems = DENSE,
) -> Loss:
    """Projection and objective for one target a row, from the LLM's logits and the CF model's.

    Args:
      logits_BxTxV: the LLM's, any float; [b, t] predicts token t of the row's title.
      label_BxT: int32, the title's tokens, its end token included; weight_BxT: float32, 0 for
        padding.
      cf_BxD: CF logits of all items [B, I], or user vectors with `items` holding the item table.
      titles: of the target items, from `title_decisions(compressed trie).pad(target_B)`.
      trie, shape: from `trie_on_device(compressed trie)`.
      alpha, beta, tau: as in `validate_objective`; may be traced.

    Returns:
      Sums; the loss is total / positions.
    """
    batch, length, _ = logits_BxTxV.shape
    row_BxK = jnp.broadcast_to(jnp.arange(batch)[:, None], titles.node_BxK.shape)
    node_K = jnp.asarray(titles.node_BxK).ravel()
    child_KxC, log_p_cf_KxC = project(cf_BxD, items, row_BxK.ravel(), node_K, trie, shape, beta)
    decision = Decisions(
        position_K=(row_BxK * length + titles.offset_BxK).ravel(),
        weight_K=jnp.asarray(titles.weight_BxK).ravel(),
        label_child_K=jnp.asarray(titles.child_BxK).ravel(),
        child_token_KxC=trie.token[child_KxC],
        log_p_cf_KxC=log_p_cf_KxC,
    )
    logits_NxV = logits_BxTxV.reshape(batch * length, -1).astype(jnp.float32)
    if softmax == "children":
        total, nll = children_loss(logits_NxV, decision, alpha, tau, form)
    else:
        label_N, weight_N = label_BxT.ravel(), weight_BxT.ravel()
        total, nll = vocabulary_loss(logits_NxV, label_N, weight_N, decision, alpha, tau, form)
    return Loss(total, jnp.sum(weight_BxT), nll, jnp.float32(batch))


def children_loss_of_hidden(
    head: Head,
    hidden_KxD: jax.Array,
    decision: Decisions,
    alpha: jax.Array | float,
    tau: jax.Array | float,
    form: str,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`children_loss` of head(hidden), with the logits of `chunk` decisions at a time.

    Args:
      head: may know only the tokens that decisions choose from (TrieArrays.choice); child_token_KxC
        counts in its last axis.
      hidden_KxD: the states before the decisions, in their order.
      chunk: by default what fits 64 MiB of logits.
    """
    chunk = chunk or _default_chunk(head, hidden_KxD)

    def loss(hidden_kxD, decision):
        decision = decision._replace(position_K=jnp.arange(hidden_kxD.shape[0]))
        return children_loss(head(hidden_kxD), decision, alpha, tau, form)

    if hidden_KxD.shape[0] <= chunk:
        return loss(hidden_KxD, decision)
    # Padded with zeros: no weight, and log p_cf = 0, so that no softmax is empty.
    xs = jax.tree.map(lambda a: _in_chunks(a, chunk), (hidden_KxD, decision))
    return _sum_over(loss, xs)


def vocabulary_loss_of_hidden(
    head: Head,
    hidden_NxD: jax.Array,
    label_N: jax.Array,
    weight_N: jax.Array,
    decision: Decisions,
    alpha: jax.Array | float,
    tau: jax.Array | float,
    form: str,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`vocabulary_loss` of head(hidden), with the logits of `chunk` positions at a time.

    No two decisions with a weight may share a position.
    """
    chunk = chunk or _default_chunk(head, hidden_NxD)

    def loss(hidden_nxD, label_n, weight_n, first):
        # The decisions of these positions follow one another: there are at most `chunk`.
        start = jnp.searchsorted(decision.position_K, first)
        local = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, chunk), decision)
        position = local.position_K - first
        local = local._replace(
            position_K=jnp.minimum(position, chunk - 1),
            weight_K=jnp.where(position < chunk, local.weight_K, 0.0),
        )
        return vocabulary_loss(head(hidden_nxD), label_n, weight_n, local, alpha, tau, form)

    size = hidden_NxD.shape[0]
    if size <= chunk:
        return vocabulary_loss(head(hidden_NxD), label_N, weight_N, decision, alpha, tau, form)
    decision = _sorted_by_position(decision, size, padding=chunk)
    xs = jax.tree.map(lambda a: _in_chunks(a, chunk), (hidden_NxD, label_N, weight_N))
    return _sum_over(loss, (*xs, chunk * jnp.arange(xs[0].shape[0])))


def _default_chunk(head: Head, hidden_NxD: jax.Array) -> int:
    row = jax.ShapeDtypeStruct((1, hidden_NxD.shape[1]), hidden_NxD.dtype)
    return max(8, _LOGITS_BYTES // (4 * jax.eval_shape(head, row).shape[1]) // 8 * 8)


def _in_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] -> [chunks, chunk, ...], padded with zeros."""
    chunks = -(-array.shape[0] // chunk)
    widths = [(0, chunks * chunk - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(chunks, chunk, *array.shape[1:])


def _sorted_by_position(decision: Decisions, size: int, padding: int) -> Decisions:
    """Decisions by ascending position, those without weight last, and `padding` more of these."""
    position_K = jnp.where(decision.weight_K > 0, decision.position_K, size)
    order_K = jnp.argsort(position_K)

    def arrange(array, fill=0):
        widths = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array[order_K], widths, constant_values=fill)

    arranged = jax.tree.map(arrange, decision)
    return arranged._replace(position_K=arrange(position_K, fill=size))


def _sum_over(loss, xs) -> tuple[jax.Array, jax.Array]:
    """Sums loss(*x) over the leading axis of xs; the backward pass computes each x again."""

    def add(sums, x):
        return jax.tree.map(jnp.add, sums, jax.checkpoint(loss)(*x)), None

    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), xs)[0]
