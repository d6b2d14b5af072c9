"""RQ-VAE: an autoencoder whose narrow vector is quantised level by level (arXiv 2107.03312).

As TIGER (arXiv 2305.05065) and LC-Rec (arXiv 2311.09049) use it for items, with LETTER's two losses
(arXiv 2405.07314) by their weights: the quantised vector agrees with the item's CF vector, and the
codes of a level lie in ten groups of about one size.

docs/semantic_ids.md says in what it differs from LC-Rec's code.

Axis letters: I items, E their embeddings' width, C CF vectors' width, B items of a batch, W width
of the quantised vector, K codes of a level, L levels, T batches of an epoch.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tca4rec_jax.batching import map_batches
from tca4rec_jax.ranges import Count, NotNegative, Positive, check_fields
from tca4rec_jax.semantic_ids.assignment import LAST_LEVEL_EPSILON, LAST_LEVEL_ROUNDS, sinkhorn
from tca4rec_jax.semantic_ids.k_means import Quantised, k_means, squared_distances
from tca4rec_jax.terminal import Progress

_CODE_GROUPS = 10  # of the diversity loss
_AT_ONCE = 4096  # items of a call after the training


@dataclass(frozen=True)
class RQVAEConfig:
    """The autoencoder and its training, by AdamW.

    Attributes:
      units: widths of the encoder's hidden layers; the decoder's are the same in reverse.
      width: of the vector that is quantised.
      epochs: how often every item is seen.
      batch_size: items per step.
      learning_rate: constant.
      commitment: weight of the encoder's distance from its codes.
      cf_weight: of the agreement with the CF model's item vectors (LETTER: 0.01 to 0.1).
      diversity_weight: of the codes' groups (LETTER: 0.0001).
    """

    units: tuple[Count, ...] = (512, 256, 128)
    width: Count = 32
    epochs: Count = 300
    batch_size: Count = 1024
    learning_rate: Positive = 1e-3
    commitment: NotNegative = 0.25
    cf_weight: NotNegative = 0.0
    diversity_weight: NotNegative = 0.0

    def __post_init__(self):
        check_fields(self, "ids.rq_vae.")


class Items(NamedTuple):
    """What is known of some items."""

    embedding_IxE: jax.Array
    cf_IxC: jax.Array | None


class RQVAE(nnx.Module):
    """Encoder, a codebook for each level, decoder."""

    def __init__(
        self, config: RQVAEConfig, codes: Sequence[int], features: int, cf: int, *, rngs: nnx.Rngs
    ):
        widths = [features, *config.units, config.width]
        self.encoder = _layers(widths, rngs)
        self.decoder = _layers(widths[::-1], rngs)
        self.codebooks = nnx.List([nnx.Param(jnp.zeros((K, config.width))) for K in codes])
        self.to_cf = nnx.Linear(config.width, cf, use_bias=False, rngs=rngs) if cf else None

    def encode(self, embedding_BxE: jax.Array) -> jax.Array:
        """float32 [B, W]."""
        return _apply(self.encoder, embedding_BxE)

    def decode(self, latent_BxW: jax.Array) -> jax.Array:
        """float32 [B, E]."""
        return _apply(self.decoder, latent_BxW)


class _Level(NamedTuple):
    """A level's quantisation of a batch."""

    code_B: jax.Array
    residual_BxW: jax.Array  # what it quantises
    chosen_BxW: jax.Array  # its vectors of these codes


def quantise(model: RQVAE, latent_BxW: jax.Array, *, even_last: bool) -> list[_Level]:
    """Level by level; `even_last` spreads the batch evenly over the last level's codes."""
    levels, residual_BxW = [], latent_BxW
    for number, codebook in enumerate(model.codebooks, start=1):
        cost_BxK = squared_distances(residual_BxW, codebook[...])
        if even_last and number == len(model.codebooks):
            cost_BxK = -sinkhorn(cost_BxK, epsilon=LAST_LEVEL_EPSILON, rounds=LAST_LEVEL_ROUNDS)
        code_B = jax.lax.stop_gradient(cost_BxK).argmin(axis=1).astype(jnp.int32)
        chosen_BxW = codebook[...][code_B]
        levels.append(_Level(code_B, residual_BxW, chosen_BxW))
        residual_BxW = residual_BxW - jax.lax.stop_gradient(chosen_BxW)
    return levels


def loss_of(
    model: RQVAE,
    config: RQVAEConfig,
    batch: Items,
    group_of_code: Sequence[jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(the loss, the reconstruction's part of it), float32 [] each; see RQVAEConfig.

    `group_of_code` are int32 [K] a level, () without the diversity loss.
    """
    latent_BxW = model.encode(batch.embedding_IxE)
    levels = quantise(model, latent_BxW, even_last=True)
    fixed, mean_square = jax.lax.stop_gradient, lambda array: jnp.square(array).mean()
    quantised_BxW = latent_BxW + fixed(sum(one.chosen_BxW for one in levels) - latent_BxW)
    reconstruction = mean_square(model.decode(quantised_BxW) - batch.embedding_IxE)
    quantisation = sum(
        mean_square(one.chosen_BxW - fixed(one.residual_BxW))
        + config.commitment * mean_square(one.residual_BxW - fixed(one.chosen_BxW))
        for one in levels
    )
    loss = reconstruction + quantisation / len(levels)
    if batch.cf_IxC is not None and model.to_cf is not None:
        logits_BxB = model.to_cf(quantised_BxW) @ batch.cf_IxC.T
        loss += config.cf_weight * _cross_entropy(logits_BxB, jnp.arange(len(logits_BxB)))
    for number, (one, codebook, group_K) in enumerate(
        zip(levels, model.codebooks, group_of_code, strict=False)
    ):
        level_key = jax.random.fold_in(key, number)
        loss += config.diversity_weight * diversity_loss(one, codebook[...], group_K, level_key)
    return loss, reconstruction


def diversity_loss(
    level: _Level, codebook_KxW: jax.Array, group_K: jax.Array, key: jax.Array
) -> jax.Array:
    """LETTER's diversity loss: a code is closer to one of its group than to all other codes.

    Every group (int32 [K]) has at least two codes.
    """
    same_BxK = group_K[level.code_B][:, None] == group_K[None, :]
    itself_BxK = level.code_B[:, None] == jnp.arange(len(group_K))[None, :]
    like_B = jax.random.categorical(key, jnp.where(same_BxK & ~itself_BxK, 0.0, -jnp.inf))
    similarity_BxK = level.chosen_BxW @ codebook_KxW.T
    return _cross_entropy(jnp.where(itself_BxK, -jnp.inf, similarity_BxK), like_B)


def fit_rq_vae(
    embedding_IxE: np.ndarray,
    codes: Sequence[int],
    config: RQVAEConfig,
    *,
    seed: int,
    cf_IxC: np.ndarray | None = None,
) -> Quantised:
    """Trains an RQ-VAE on all items and gives their codes, each level's the nearest.

    Args:
      embedding_IxE: float32.
      codes: how many codes each level has.
      seed: of everything random.
      cf_IxC: float32, the CF model's item vectors, for cf_weight > 0.

    Raises FloatingPointError if the loss is NaN or infinite.
    """
    items = Items(_scaled(embedding_IxE), None if cf_IxC is None else _scaled(cf_IxC))
    cf_width = 0 if cf_IxC is None else cf_IxC.shape[1]
    model = RQVAE(config, codes, embedding_IxE.shape[1], cf_width, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed)
    _start_codebooks(model, items.embedding_IxE, key)
    graph, params = nnx.split(model)
    state = params, _optimizer(config).init(params)
    rng, batch_size = np.random.default_rng(seed), min(config.batch_size, len(embedding_IxE))
    steps = len(embedding_IxE) // batch_size
    with Progress("RQ-VAE", config.epochs, "epochs") as progress:
        for epoch in range(config.epochs):
            epoch_key, group_key = jax.random.split(jax.random.fold_in(key, epoch))
            groups = (
                _groups(nnx.merge(graph, state[0]), group_key) if config.diversity_weight else ()
            )
            order = rng.permutation(len(embedding_IxE))[: steps * batch_size]
            batches_TxB = order.reshape(steps, batch_size).astype(np.int32)
            state, losses = _epoch(graph, config, items, state, batches_TxB, groups, epoch_key)
            loss, reconstruction = map(float, losses)
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the RQ-VAE's loss is {loss} in epoch {epoch + 1}; lower "
                    f"ids.rq_vae.learning_rate ({config.learning_rate})"
                )
            progress.advance(1, f"loss {loss:.4f}", f"reconstruction {reconstruction:.4f}")
    return _quantised(graph, state[0], np.asarray(items.embedding_IxE))


def _layers(widths: Sequence[int], rngs: nnx.Rngs) -> nnx.List:
    initializer = nnx.initializers.xavier_normal()
    pairs = itertools.pairwise(widths)
    return nnx.List([nnx.Linear(*pair, kernel_init=initializer, rngs=rngs) for pair in pairs])


def _apply(layers: nnx.List, x: jax.Array) -> jax.Array:
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(layer(x))
    return last(x)


def _cross_entropy(logits_BxN: jax.Array, target_B: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxN, target_B).mean()


def _scaled(vectors_IxE: np.ndarray) -> jax.Array:
    """Of mean 0 and mean square 1, so that losses mean the same whatever made the vectors."""
    centred_IxE = vectors_IxE - vectors_IxE.mean(axis=0)
    return jnp.asarray(centred_IxE / max(float(np.sqrt(np.square(centred_IxE).mean())), 1e-30))


def _start_codebooks(model: RQVAE, embedding_IxE: jax.Array, key: jax.Array) -> None:
    """The codebooks by k-means of what the untrained encoder gives."""
    residual_IxW = model.encode(embedding_IxE)
    for level, codebook in enumerate(model.codebooks):
        level_key = jax.random.fold_in(key, level)
        codebook[...], code_I = k_means(residual_IxW, level_key, len(codebook[...]))
        residual_IxW = residual_IxW - codebook[...][code_I]


def _groups(model: RQVAE, key: jax.Array) -> tuple[jax.Array, ...]:
    """The group of every code of each level, at least two in each."""
    books = [book[...] for book in model.codebooks]
    counts = [max(1, min(_CODE_GROUPS, len(book) // 2)) for book in books]
    pairs = zip(books, counts, strict=True)
    return tuple(k_means(book, key, count, balanced=True)[1] for book, count in pairs)


def _optimizer(config: RQVAEConfig) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _epoch(graph, config, items, state, batches_TxB, groups, key):
    """(parameters and optimizer state after an epoch, the mean of its batches' losses [2])."""

    def step(state, batch):
        params, moments = state
        item_B, number = batch
        part = jax.tree.map(lambda array: array[item_B], items)
        batch_key = jax.random.fold_in(key, number)

        def of(params):
            return loss_of(nnx.merge(graph, params), config, part, groups, batch_key)

        losses, gradients = jax.value_and_grad(of, has_aux=True)(params)
        updates, moments = _optimizer(config).update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), jnp.stack(losses)

    state, losses_Tx2 = jax.lax.scan(step, state, (batches_TxB, jnp.arange(len(batches_TxB))))
    return state, losses_Tx2.mean(axis=0)


def _quantised(graph: nnx.GraphDef, params: nnx.State, embedding_IxE: np.ndarray) -> Quantised:
    @jax.jit
    def of_batch(embedding_BxE):
        model = nnx.merge(graph, params)
        levels = quantise(model, model.encode(embedding_BxE), even_last=False)
        sums = itertools.accumulate(one.chosen_BxW for one in levels)
        left_BxL = [jnp.square(model.decode(one) - embedding_BxE).mean(axis=1) for one in sums]
        codes_BxL = jnp.stack([one.code_B for one in levels], axis=1)
        return codes_BxL, levels[-1].residual_BxW, jnp.stack(left_BxL, axis=1)

    codes_IxL, last_IxW, left_IxL = map_batches(of_batch, embedding_IxE, batch_size=_AT_ONCE)
    last_KxW = np.asarray(nnx.merge(graph, params).codebooks[-1][...])
    return Quantised(codes_IxL, last_IxW, last_KxW, tuple(left_IxL.mean(axis=0).tolist()))
