"""The trainer of CF models: jitted epochs, early stopping on full-ranking NDCG@10, resume.

The interactions lie on the device once; a training batch is a set of flat positions whose windows
are gathered inside the jitted program, and an epoch is one `lax.scan` over its batches, or for
targets 'rows', whose windows have several widths, one of each batch.

Axis letters: B batch of windows, P supervised positions of a window, N negatives, D model, I items,
n flat positions, T batches, W windows of an epoch.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx

from tca4rec_jax.batching import bucket_lengths
from tca4rec_jax.cf import losses
from tca4rec_jax.cf.checkpoint import read_arrays, write_arrays
from tca4rec_jax.cf.models.base import CFModel
from tca4rec_jax.cf.models.popularity import popularity_logits
from tca4rec_jax.cf.scoring import check_items, has_widths, score_targets
from tca4rec_jax.cf.windows import FlatRows, cut_rows, windows_at
from tca4rec_jax.data.sequences import PAD_ITEM, ItemSequences
from tca4rec_jax.errors import UserError, reading
from tca4rec_jax.fileio import fingerprint
from tca4rec_jax.metrics import mean_metrics
from tca4rec_jax.ranges import Count, Positive, Seed, check_fields
from tca4rec_jax.terminal import Progress

_SAVE_SECONDS = 20.0
_FEWEST_DRAWN = 32  # items of a sampled softmax
_WIDTHS = 3  # of the windows of targets 'rows', each compiled once


@dataclass(frozen=True)
class FitSchedule:
    """How long and how fast a CF model is trained.

    Attributes:
      learning_rate: Adam's.
      batch_size: windows per step.
      max_epochs: the limit; at least 1.
      patience: epochs without a better validation NDCG@10 before training stops.
      seed: of the windows' order, dropout and negatives.
    """

    learning_rate: Positive = 1e-3
    batch_size: Count = 256
    max_epochs: Count = 40
    patience: Count = 6
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self, "cf.")


@dataclass(frozen=True)
class FitConfig(FitSchedule, losses.LossConfig):
    """How a CF model is trained: see LossConfig and FitSchedule."""


@dataclass(frozen=True)
class FitResult:
    """The model of the best epoch (1-based); by epoch its number, loss, metrics and seconds."""

    model: CFModel
    best_epoch: int
    epochs: list[dict[str, float]]


class _Rows(NamedTuple):
    """The training data on the device."""

    flat: FlatRows
    seen: losses.SeenByUser | None
    log_share_I: jax.Array | None = None  # of the draws of a sampled softmax


class _Batches(NamedTuple):
    """T batches of an epoch, whose windows are equally wide."""

    width: int  # the most items before a target
    number_T: np.ndarray  # int32, in the epoch
    position_TxB: np.ndarray  # int32, where the windows end


def evaluate(model: CFModel, rows: ItemSequences) -> dict[str, float]:
    """Means over the rows: 'ndcg@10', 'hr@10' over the whole catalogue, 'nll' of the target."""
    scores = score_targets(model, rows)
    return mean_metrics(scores.rank, (10,)) | {"nll": float(scores.nll.mean())}


def fit(
    model: CFModel,
    train: ItemSequences,
    validation: ItemSequences,
    config: FitConfig,
    *,
    checkpoint: Path | None = None,
    made_from: Mapping[str, Any] | None = None,
    evaluate: Callable[[CFModel, ItemSequences], dict[str, float]] = evaluate,
) -> FitResult:
    """Trains `model` on the users' sequences `train`; the model passed in is left unchanged.

    `validation` (for targets 'last' `train` too) are histories with their target last: after every
    epoch `evaluate` gives the metrics of these rows, and 'ndcg@10' chooses the best epoch. The file
    `checkpoint` gets the state now and then: a training of the same config and data, and a model
    made from the same (inputs besides its config), that was cut off goes on from it. It stays after
    the training.

    Raises UserError for an item the model does not know, no validation rows, or a catalogue so
    small that no negative may be left to sample; FloatingPointError if the loss is NaN or infinite.
    """
    rows = _rows_on_device(model, train, validation, config)
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, constants = states
    compiled = dataclasses.replace(config, seed=0, max_epochs=1, patience=1)  # whatever they are
    run_batches = functools.partial(_run_batches, graph, compiled, constants, rows)
    # An epoch donates what it is given, and the caller keeps the model passed in.
    params = jax.tree.map(jnp.copy, params)
    fresh = params, _optimizer(config).init(params), params
    hashes = [rows.content_hash() for rows in (train, validation)]
    identity = fingerprint([dataclasses.asdict(config), [repr(model.config), made_from], hashes])
    (params, optimizer, best_params), epochs = _resume(checkpoint, fresh, identity)
    make = _epochs_of_rows if config.targets == "rows" else _epochs
    batches = itertools.islice(make(train, model, config), len(epochs), None)
    if has_widths(model):
        validation = validation.take(np.argsort(validation.lengths, kind="stable"))
    best = max(epochs, key=lambda record: record["ndcg@10"])["epoch"] if epochs else 0
    start = time.perf_counter() - (epochs[-1]["seconds"] if epochs else 0.0)

    key = jax.random.key(config.seed)
    carry, saved = (params, optimizer), time.perf_counter()
    with Progress("CF", config.max_epochs, "epochs", len(epochs)) as progress:
        for epoch in range(len(epochs) + 1, config.max_epochs + 1):
            if best and epoch - 1 - best >= config.patience:
                break
            epoch_key = jax.random.fold_in(key, epoch)
            carry, loss = _run_epoch(run_batches, carry, next(batches), epoch_key)
            if not np.isfinite(loss):
                hint = f"lower cf.learning_rate ({config.learning_rate})"
                raise FloatingPointError(f"the CF loss is {loss} in epoch {epoch}; {hint}")
            scores = evaluate(nnx.merge(graph, carry[0], constants), validation)
            seconds = time.perf_counter() - start
            epochs.append({"epoch": epoch, "loss": loss, **scores, "seconds": seconds})
            if not best or scores["ndcg@10"] > epochs[best - 1]["ndcg@10"]:
                best, best_params = epoch, jax.tree.map(jnp.copy, carry[0])
            now, most = (epochs[number - 1]["ndcg@10"] for number in (epoch, best))
            said = f"loss {loss:.3f}", f"ndcg@10 {now:.4f}", f"best {most:.4f} at {best}"
            progress.advance(1, *said)
            if checkpoint is not None and time.perf_counter() - saved > _SAVE_SECONDS:
                _save(checkpoint, (*carry, best_params), identity, epochs)
                saved = time.perf_counter()
    return FitResult(nnx.merge(graph, best_params, constants), best, epochs)


def _rows_on_device(
    model: CFModel, train: ItemSequences, validation: ItemSequences, config: FitConfig
) -> _Rows:
    """The training data, checked; raises as `fit`."""
    num_items = model.config.num_items
    for rows in (train, validation):
        check_items(rows, num_items)
    if not len(validation):
        raise UserError("there are no validation rows: early stopping needs at least one")
    if config.loss == "sampled_softmax":
        if config.negatives < _FEWEST_DRAWN:
            raise UserError(
                f"negatives is {config.negatives}: the CF loss 'sampled_softmax' draws so many for "
                f"all targets of a batch together; give at least {_FEWEST_DRAWN}, such as 4096"
            )
        flat = FlatRows.of(train)
        return _Rows(flat, None, jnp.asarray(popularity_logits(train, num_items)))
    sampled = config.loss != "softmax"
    by_user = sampled and config.negatives_outside == "user"
    if sampled and not by_user and num_items <= model.config.history_length + 1:
        raise UserError(
            f"the CF loss {config.loss!r} samples negatives outside the window, which {num_items} "
            "items cannot always provide; use 'softmax'"
        )
    seen = losses.SeenByUser.of(train, num_items) if by_user else None
    return _Rows(FlatRows.of(train), seen)


def _epochs(rows: ItemSequences, model: CFModel, config: FitConfig) -> Iterator[list[_Batches]]:
    """Shuffled flat positions of epochs; what one leaves over opens the next one."""
    every, length = config.targets != "last", model.config.history_length
    positions = np.arange(len(rows.items)) if every else rows.last_positions
    windows = len(positions) // (length if config.targets == "all" else 1)
    batch_size = min(config.batch_size, len(positions))
    wanted = max(windows // batch_size, 1) * batch_size
    rng, left = np.random.default_rng(config.seed), np.empty(0, np.int32)
    while True:
        while len(left) < wanted:
            shuffled = positions[rng.permutation(len(positions))]
            left = np.concatenate([left, shuffled.astype(np.int32)])
        position_TxB = left[:wanted].reshape(-1, batch_size)
        yield [_Batches(length, np.arange(len(position_TxB), dtype=np.int32), position_TxB)]
        left = left[wanted:]


def _epochs_of_rows(
    rows: ItemSequences, model: CFModel, config: FitConfig
) -> Iterator[list[_Batches]]:
    """Epochs of the windows of all rows: batches of equally wide ones in random order.

    The wider the windows, the fewer of them, so that every batch has about as many targets. The
    last batch of a width is filled up with windows of the first.
    """
    longest = model.config.history_length
    end_W, length_W = cut_rows(rows, longest)
    widths = np.array([longest])
    if model.any_width:
        widths = np.unique(np.minimum(bucket_lengths(length_W, _WIDTHS), longest))
    groups = []
    for number, width in enumerate(widths.tolist()):
        chosen_W = np.searchsorted(widths, length_W) == number
        share = length_W.mean() / length_W[chosen_W].mean()
        batch_size = min(max(round(config.batch_size * share), 1), int(chosen_W.sum()))
        groups.append((width, end_W[chosen_W].astype(np.int32), batch_size))
    rng = np.random.default_rng(config.seed)
    while True:
        batches: list[tuple[int, np.ndarray]] = []
        for width, end_w, batch_size in groups:
            filled = np.resize(rng.permutation(end_w), -(-len(end_w) // batch_size) * batch_size)
            batches += [(width, batch_1xB) for batch_1xB in filled.reshape(-1, 1, batch_size)]
        order = rng.permutation(len(batches))
        yield [
            _Batches(batches[at][0], np.array([n], np.int32), batches[at][1])
            for n, at in enumerate(order)
        ]


def _run_epoch(
    run_batches: Callable, carry: tuple, epoch: list[_Batches], key: jax.Array
) -> tuple[tuple, float]:
    """(Parameters, optimizer state) after an epoch, and the mean of its losses."""
    means = []
    for width, *batches in epoch:
        carry, mean = run_batches(width, carry, batches, key)
        means.append(mean)
    return carry, float(np.mean(jax.device_get(means)))


def _optimizer(config: FitConfig) -> optax.GradientTransformation:
    if config.regularisation:
        return optax.adamw(config.learning_rate, weight_decay=config.regularisation)
    return optax.adam(config.learning_rate)


@functools.partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=5)
def _run_batches(graph, config, constants, rows, width, carry, batches, key):
    """(params, optimizer state) after some batches, and the mean of their losses.

    `batches` are (number_T, position_TxB) as in `_Batches`.
    """
    optimizer = _optimizer(config)

    def step(carry, batch):
        params, state = carry
        number, position_B = batch
        batch_key = jax.random.fold_in(key, number)
        batch_loss, gradients = jax.value_and_grad(batch_loss_of)(
            params, graph, constants, config, rows, width, position_B, batch_key
        )
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), batch_loss

    carry, loss_T = jax.lax.scan(step, carry, tuple(batches))
    return carry, loss_T.mean()


def batch_loss_of(
    params: nnx.State,
    graph: nnx.GraphDef,
    constants: nnx.State,
    config: FitConfig,
    rows: _Rows,
    width: int,
    position_B: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Mean loss over the targets of the windows of `width` before flat positions, float32 []."""
    model = nnx.merge(graph, params, constants)
    windows = windows_at(rows.flat, position_B, width)
    query_key, negative_key = jax.random.split(key)
    queries = model.queries(windows, config.targets not in ("all", "rows"), query_key)
    supervised_BxP = queries.target_BxP != PAD_ITEM
    target_BxP = jnp.maximum(queries.target_BxP, 0)
    if config.loss == "softmax":
        loss = losses.softmax_loss(queries, target_BxP, supervised_BxP)
    elif rows.log_share_I is not None:  # a sampled softmax
        items_n, num_items = rows.flat.items_n, len(queries.items.table_IxD)
        drawn_N = losses.draw_popular(negative_key, items_n, config.negatives, num_items)
        of_batch = queries, target_BxP, supervised_BxP
        loss = losses.sampled_softmax_loss(*of_batch, drawn_N, rows.log_share_I)
    else:
        count, num_items = target_BxP.shape[1] * config.negatives, len(queries.items.table_IxD)
        if rows.seen is not None:
            drawn = losses.user_negatives(negative_key, rows.seen, windows.user_B, count, num_items)
        else:
            seen_BxW = jnp.concatenate([windows.history_BxS, windows.target_BxS[:, -1:]], axis=1)
            drawn = losses.window_negatives(negative_key, seen_BxW, count, num_items)
        negative_BxPxN = drawn.reshape(*target_BxP.shape, config.negatives)
        loss_BxP = losses.sampled_loss(config.loss, queries, target_BxP, negative_BxPxN)
        loss = jnp.sum(loss_BxP * supervised_BxP)
    return loss / jnp.maximum(jnp.sum(supervised_BxP), 1)


def _save(path: Path, state: tuple, identity: str, epochs: list[dict]) -> None:
    """Writes what training goes on from: (parameters, optimizer, best parameters), and its log."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    write_arrays(path, leaves, json.dumps({"identity": identity, "epochs": epochs}))


def _resume(path: Path | None, fresh: tuple, identity: str) -> tuple[tuple, list[dict]]:
    """The state and epochs of a training that was cut off, or the fresh ones."""
    if path is None or not path.exists():
        return fresh, []
    try:
        with reading(path, "CF training"):
            leaves, text = read_arrays(path)
            record = json.loads(text)
            if record["identity"] != identity:
                return fresh, []
            ordered = [jnp.asarray(leaves[str(number)]) for number in range(len(leaves))]
            state, epochs = jax.tree.unflatten(jax.tree.structure(fresh), ordered), record["epochs"]
    except UserError as error:
        logging.warning("CF: %s; training starts from scratch", error)
        return fresh, []
    logging.info("CF: going on after epoch %d of %s", len(epochs), path)
    return state, epochs
