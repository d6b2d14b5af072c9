"""The trainer of sequential CF models: jitted epochs, early stopping on full-ranking NDCG@10.

The interactions lie on the device once; a training batch is a set of flat positions whose windows
are gathered inside the jitted program, and an epoch is one `lax.scan` over its batches.

Axis letters: B batch of windows, S history length, D model, I items, n flat positions, E batches of
an epoch.
"""

import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from tca4rec_jax.cf.sasrec import SASRec
from tca4rec_jax.cf.scoring import cf_logits, check_items, score_rows, user_vectors
from tca4rec_jax.cf.windows import row_starts, targets_of_windows, windows_before
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.ranking import mean_metrics

LOSSES = ("softmax", "bce")
LABELS = ("all", "last")


@dataclass(frozen=True)
class FitConfig:
    """How a CF model is trained.

    Attributes:
      loss: 'softmax', cross-entropy over the whole catalogue (its logits are calibrated at
        temperature 1); 'bce', binary cross-entropy of the target and one uniformly sampled negative
        outside the window and the target (the original).
      labels: 'all', every place of a window predicts the item after it, and an epoch takes as many
        random windows as it needs to supervise each position about once; 'last', only the end of a
        window is supervised, and an epoch takes the window of every position (slower by a factor
        of the history length).
      learning_rate: Adam's.
      batch_size: windows per step.
      max_epochs: the limit; at least 1.
      patience: epochs without a better validation NDCG@10 before training stops.
      seed: of the windows' order, dropout and negatives.
    """

    loss: str = "softmax"
    labels: str = "all"
    learning_rate: float = 1e-3
    batch_size: int = 256
    max_epochs: int = 200
    patience: int = 10
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("loss", LOSSES), ("labels", LABELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"cf.{name} is {getattr(self, name)!r}: expected one of {allowed}")
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"cf.{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"cf.learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class FitResult:
    """The best model and how it came about.

    Attributes:
      model: with the parameters of the best epoch.
      best_epoch: 1-based.
      epochs: one dict per epoch: 'epoch', 'loss', 'ndcg@10', 'hr@10', 'nll', 'seconds'
        (since the start).
    """

    model: SASRec
    best_epoch: int
    epochs: list[dict[str, float]]


def fit(
    model: SASRec, train: ItemSequences, validation: ItemSequences, config: FitConfig
) -> FitResult:
    """Trains `model` on the users' sequences `train`; the model passed in is left unchanged.

    Args:
      model: a CF model with `hidden`, `user_vectors` and `item_table`.
      train: users' sequences of the training period.
      validation: histories with their target last; ranked in full after every epoch.
      config: see FitConfig.

    Raises:
      ValueError: an item the model does not know, no validation rows, or (bce) a catalogue so small
        that a window may leave no negative.
      FloatingPointError: the loss became NaN or infinite.
    """
    num_items = model.config.num_items
    check_items(train, num_items)
    check_items(validation, num_items)
    if not len(validation):
        raise ValueError("there are no validation rows: early stopping needs at least one")
    if config.loss == "bce" and num_items <= model.config.history_length + 1:
        raise ValueError(
            f"cf.loss 'bce' samples a negative outside the window, which {num_items} items cannot "
            "always provide; use cf.loss 'softmax'"
        )
    graph, params = nnx.split(model, nnx.Param)
    flat = (jnp.asarray(train.items), jnp.asarray(row_starts(train)))
    settings = (graph, config.loss, config.labels, config.learning_rate)
    run_epoch = functools.partial(_run_epoch, *settings, *flat)
    # An epoch donates what it is given, and the caller keeps the model passed in.
    params = jax.tree.map(jnp.copy, params)
    carry = (params, optax.adam(config.learning_rate).init(params))
    root_key = jax.random.key(config.seed)
    order = _BatchOrder(len(train.items), model.config.history_length, config)

    best, epochs, start = None, [], time.perf_counter()
    progress = tqdm(range(1, config.max_epochs + 1), desc="CF", unit="epoch")
    for epoch in progress:
        carry, loss = run_epoch(carry, order.next_epoch(), jax.random.fold_in(root_key, epoch))
        if not np.isfinite(loss := float(loss)):
            raise FloatingPointError(
                f"the CF loss is {loss} in epoch {epoch}; lower cf.learning_rate "
                f"({config.learning_rate})"
            )
        scores = evaluate(nnx.merge(graph, carry[0]), validation)
        epochs.append({"epoch": epoch, "loss": loss, **scores})
        epochs[-1]["seconds"] = time.perf_counter() - start
        if best is None or scores["ndcg@10"] > epochs[best - 1]["ndcg@10"]:
            best, best_params = epoch, jax.tree.map(jnp.copy, carry[0])
        progress.set_postfix(loss=f"{loss:.3f}", ndcg10=f"{scores['ndcg@10']:.4f}", best=best)
        if epoch - best >= config.patience:
            break
    progress.close()
    return FitResult(nnx.merge(graph, best_params), best, epochs)


def evaluate(model: SASRec, rows: ItemSequences) -> dict[str, float]:
    """Means over the rows: 'ndcg@10', 'hr@10' over the whole catalogue, 'nll' of the target."""
    vector_RxD = user_vectors(model, rows, rows.last_positions)
    target_R = rows.items[rows.last_positions]
    scores = score_rows(vector_RxD, np.asarray(model.item_table[...]), target_R)
    return mean_metrics(scores.rank, (10,)) | {"nll": float(scores.nll.mean())}


class _BatchOrder:
    """Shuffled flat positions, batch after batch; what an epoch leaves over opens the next one."""

    def __init__(self, num_positions: int, history_length: int, config: FitConfig):
        self._num_positions = num_positions
        self._rng = np.random.default_rng(config.seed)
        windows = num_positions // (history_length if config.labels == "all" else 1)
        self._batch_size = min(config.batch_size, num_positions)
        self._num_batches = max(windows // self._batch_size, 1)
        self._left = np.empty(0, np.int32)

    def next_epoch(self) -> np.ndarray:
        """int32 [E, B]."""
        wanted = self._num_batches * self._batch_size
        while len(self._left) < wanted:
            shuffled = self._rng.permutation(self._num_positions).astype(np.int32)
            self._left = np.concatenate([self._left, shuffled])
        taken, self._left = self._left[:wanted], self._left[wanted:]
        return taken.reshape(self._num_batches, self._batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6)
def _run_epoch(graph, loss, labels, learning_rate, items_n, row_starts_n, carry, position_ExB, key):
    """One epoch: (params, optimizer state) after it, and the mean of its batches' losses."""
    optimizer = optax.adam(learning_rate)

    def step(carry, batch):
        params, state = carry
        position_B, number = batch
        batch_key = jax.random.fold_in(key, number)
        batch_loss, gradients = jax.value_and_grad(window_loss)(
            params, graph, loss, labels, items_n, row_starts_n, position_B, batch_key
        )
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), batch_loss

    carry, losses = jax.lax.scan(step, carry, (position_ExB, jnp.arange(len(position_ExB))))
    return carry, losses.mean()


def window_loss(params, graph, loss, labels, items_n, row_starts_n, position_B, key):
    """Mean loss over the supervised places of the windows before the positions; float32 []."""
    model = nnx.merge(graph, params)
    length = model.config.history_length
    history_BxS = windows_before(items_n, row_starts_n, position_B, length)
    target_BxS = targets_of_windows(items_n, row_starts_n, position_B, length)
    dropout_key, negative_key = jax.random.split(key)
    hidden_BxSxD = model.hidden(history_BxS, dropout_key)
    if labels == "last":
        hidden_BxSxD, target_BxS = hidden_BxSxD[:, -1:], target_BxS[:, -1:]
    table_IxD = model.item_table[...]
    supervised_BxS = target_BxS != PAD_ITEM
    target_BxS = jnp.maximum(target_BxS, 0)
    if loss == "softmax":
        loss_BxS = _softmax_loss(hidden_BxSxD, table_IxD, target_BxS)
    else:
        shape = target_BxS.shape
        seen_BxW = jnp.concatenate([history_BxS, items_n[position_B][:, None]], axis=1)
        negative_BxS = _negatives(negative_key, seen_BxW, shape[1], len(table_IxD))
        loss_BxS = _pair_loss(hidden_BxSxD, table_IxD, target_BxS, negative_BxS)
    return jnp.sum(loss_BxS * supervised_BxS) / jnp.sum(supervised_BxS)


def _softmax_loss(hidden_BxSxD, table_IxD, target_BxS):
    """Cross-entropy over the whole catalogue, float32 [B, S]."""
    flat_PxD = hidden_BxSxD.reshape(-1, hidden_BxSxD.shape[-1])
    logits_PxI = cf_logits(flat_PxD, table_IxD)
    loss_P = optax.softmax_cross_entropy_with_integer_labels(logits_PxI, target_BxS.reshape(-1))
    return loss_P.reshape(target_BxS.shape)


def _pair_loss(hidden_BxSxD, table_IxD, target_BxS, negative_BxS):
    """Binary cross-entropy of the target and one negative, float32 [B, S]."""
    positive_BxS = jnp.sum(hidden_BxSxD * table_IxD[target_BxS], axis=-1)
    negative_BxS = jnp.sum(hidden_BxSxD * table_IxD[negative_BxS], axis=-1)
    return jax.nn.softplus(-positive_BxS) + jax.nn.softplus(negative_BxS)


def _negatives(key, seen_BxW, count, num_items):
    """Uniform items outside each row of `seen`, int32 [B, count].

    A number k drawn from 0 .. (I - number of distinct seen items - 1) stands for the k-th unseen
    item. Walking through the sorted seen items, each one not above the number so far moves it up
    by one.
    """
    sorted_BxW = jnp.sort(seen_BxW, axis=1)
    first_BxW = jnp.concatenate(
        [sorted_BxW[:, :1] != PAD_ITEM, sorted_BxW[:, 1:] != sorted_BxW[:, :-1]], axis=1
    )
    # A repeated or padding entry moves nothing: it is set beyond every item.
    blocked_BxW = jnp.where(first_BxW & (sorted_BxW != PAD_ITEM), sorted_BxW, num_items)
    blocked_BxW = jnp.sort(blocked_BxW, axis=1)
    unseen_B = num_items - jnp.sum(blocked_BxW < num_items, axis=1)
    draw_BxS = jax.random.randint(key, (len(seen_BxW), count), 0, unseen_B[:, None])
    for place in range(seen_BxW.shape[1]):
        draw_BxS = draw_BxS + (draw_BxS >= blocked_BxW[:, place : place + 1])
    return draw_BxS
