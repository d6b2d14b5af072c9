"""From examples to padded batches through grain, in a small set of fixed shapes.

A batch holds rows of one length bucket, so that each bucket is compiled once.  The order is a pure
function of (seed, epoch), so that a batch's number is all there is to a position in the data (grain
reads ahead, but keeps no state worth saving): training resumes where it stopped, on any devices.
In a job of several processes each makes its own rows of every batch, and reads only their CF
logits.

Axis letters: B batch (or this process' rows of it), S sequence, T supervised positions,
P supervised titles, K decisions, D CF vector (or I items where the store is dense) or model.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from tca4rec_jax.batching import bucket_lengths, pad_rows, round_up
from tca4rec_jax.cf.logits_store import CFLogits
from tca4rec_jax.core.collaborative_tokenizer import CFItems
from tca4rec_jax.core.decisions import Decisions, Targets
from tca4rec_jax.errors import UserError
from tca4rec_jax.llm.projector import SoftTokens
from tca4rec_jax.training.activation_cache import ActivationCache
from tca4rec_jax.training.curriculum import Curriculum
from tca4rec_jax.training.examples import Examples

_BUCKETS = 4  # chosen from the data: each is compiled, which takes about a minute


class Batch(NamedTuple):
    """One batch; padding rows have length 1 and weight 0. On the host NumPy arrays."""

    tokens_BxS: Any  # int32, padded on the right with 0
    length_B: Any  # int32
    targets: Targets
    cf_BxPxD: Any  # float32, CF user vectors (factorised) or item logits (dense)
    # Cached hidden states after the frozen prefix, in the LLM's dtype; None: the prefix runs too.
    frozen_BxSxD: Any = None
    soft: SoftTokens | None = None  # padding at position S


class BatchShape(NamedTuple):
    """The static sizes of a bucket's batches: rows, and what a row has at most."""

    rows: int
    tokens: int
    positions: int
    titles: int
    decisions: int


def rows_of_batch(tokens: int, batch_size: int, tokens_per_batch: int = 0) -> int:
    """The rows of a batch of this padded length: as many times batch_size as the budget holds.

    So it depends on no mesh, and divides over each that batch_size divides over. 0 tokens_per_batch
    stands for batch_size rows; UserError for fewer than these take.
    """
    if not tokens_per_batch:
        return batch_size
    if tokens_per_batch < batch_size * tokens:
        raise UserError(
            f"training.tokens_per_batch is {tokens_per_batch}: expected 0 or at least "
            f"{batch_size * tokens}, training.batch_size={batch_size} rows of {tokens} tokens"
        )
    return tokens_per_batch // (batch_size * tokens) * batch_size


def abstract_batch(
    shape: BatchShape,
    cf_width: int,
    cached: tuple[int, np.dtype] | None = None,
    soft: tuple[int, int] | None = None,
) -> Batch:
    """Shapes and dtypes of a whole batch, for compiling without data.

    `cached` is (width, dtype) of cached hidden states, `soft` (number, width) of soft tokens, if
    the batch has them.
    """

    def of(dtype, *sizes) -> Any:
        return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype)

    position, decision = of(np.int32, shape.positions), of(np.int32, shape.decisions)
    decisions = Decisions._make([*[decision] * 4, of(np.float32, shape.decisions)])
    weights = of(np.float32, shape.positions), of(np.float32, shape.titles)
    return Batch(
        tokens_BxS=of(np.int32, shape.tokens),
        length_B=of(np.int32),
        targets=Targets(position, position, *weights, decisions),
        cf_BxPxD=of(np.float32, shape.titles, cf_width),
        frozen_BxSxD=cached and of(cached[1], shape.tokens, cached[0]),
        soft=abstract_soft_tokens(shape.rows, soft),
    )


def abstract_soft_tokens(rows: int, sizes: tuple[int, int] | None) -> SoftTokens | None:
    """The shapes of soft tokens of rows, `sizes` (number, width) in each; None without."""
    if sizes is None:
        return None
    positions: Any = jax.ShapeDtypeStruct((rows, sizes[0]), np.int32)
    return SoftTokens(positions, jax.ShapeDtypeStruct((rows, *sizes), np.float32))


class NoLogits:
    """In place of CF logits where none are read (alpha = 0): zeros of one column."""

    def __init__(self, num_items: int):
        self.cf_items = CFItems(np.zeros((num_items, 1), np.float32))

    def read(self, positions_m: np.ndarray) -> np.ndarray:
        """float32 [m, 1]."""
        return np.zeros((len(positions_m), 1), np.float32)


class Batches:
    """All batches of any number of passes over the examples, by number.

    Every example is in the smallest bucket (tokens) that holds it; UserError if none does. Without
    buckets the four with the least padding are taken.

    The store of CF logits is needed once a batch is gathered (`cf_positions` says which are read),
    a cache if hidden states are read from it, `soft` (examples int64 [B], their padded length ->
    SoftTokens) if prompts have placeholders; a curriculum leaves these out of some batches.
    `row_weights` (examples int64 [B] of a whole batch -> float32 [B]) weighs rows, by default
    alike. A batch has `rows_of_batch` over all processes, less where a bucket has fewer examples,
    and this one makes local_rows of so many (their indices, int64, ascending; all by default).
    `shapes` are those of the buckets, the shortest first, `bucket_of_example` (int) indices into
    them.
    """

    def __init__(
        self,
        examples: Examples,
        store: CFLogits | None = None,
        *,
        batch_size: int,
        seed: int,
        buckets: Sequence[int],
        tokens_per_batch: int = 0,
        local_rows: Callable[[int], np.ndarray] = np.arange,
    ):
        self.examples, self.store = examples, store
        self.cache: ActivationCache | None = None
        self.soft: Callable[[np.ndarray, int], SoftTokens] | None = None
        self.curriculum: Curriculum | None = None
        self.row_weights: Callable[[np.ndarray], np.ndarray] | None = None
        self._seed = seed
        longest = examples.tokens.lengths.max()
        buckets = buckets or bucket_lengths(examples.tokens.lengths, _BUCKETS).tolist()
        widths = np.unique(np.minimum(buckets, round_up(longest, 8)))
        if longest > (widest := widths[-1]):
            largest = f"the largest of training.buckets is {widest}"
            raise UserError(f"an example has {longest} tokens, {largest}: add a larger one")
        bucket = np.searchsorted(widths, examples.tokens.lengths)
        used, self.bucket_of_example = np.unique(bucket, return_inverse=True)
        size_of = partial(rows_of_batch, batch_size=batch_size, tokens_per_batch=tokens_per_batch)
        size_of(int(widths[used[-1]]))  # the longest is the one to complain of
        self.shapes = [
            _bucket_shape(
                examples,
                inside := bucket == b,
                min(size_of(int(widths[b])), round_up(int(inside.sum()), batch_size)),
                int(widths[b]),
            )
            for b in used
        ]
        rows_of_bucket = [shape.rows for shape in self.shapes]
        self._batches_of_bucket = -(-np.bincount(self.bucket_of_example) // rows_of_bucket)
        self._local_rows = {rows: local_rows(rows) for rows in rows_of_bucket}

    @property
    def per_epoch(self) -> int:
        """The number of batches of one pass over the examples."""
        return int(self._batches_of_bucket.sum())

    @property
    def padding_share(self) -> float:
        """Share of an epoch's tokens that is padding."""
        tokens = self._batches_of_bucket @ [shape.rows * shape.tokens for shape in self.shapes]
        return 1.0 - float(self.examples.tokens.lengths.sum() / tokens)

    def rows(self, index: int) -> np.ndarray:
        """Examples of batch `index` (counted over all epochs): of one bucket, up to its rows."""
        return _epoch_order(self, index // self.per_epoch)[index % self.per_epoch]

    def tokens(self, index: int) -> int:
        """The number of tokens of batch `index`, without padding."""
        return int(self.examples.tokens.lengths[self.rows(index)].sum())

    def cf_positions(self, stop: int) -> np.ndarray:
        """int64: the flat positions whose CF logits this process reads for the first batches."""
        batches = map(self.rows, range(stop))
        local = [rows[self._here(rows)] for rows in batches]
        used = np.unique(np.concatenate([np.zeros(0, np.int64), *local]))
        return np.unique(self.examples.cf_position.take(used).values)

    @property
    def cf_items(self) -> CFItems:
        """The item side of the CF logits."""
        assert self.store is not None
        return self.store.cf_items

    def __call__(self, index: int) -> Batch:
        """This process' rows of batch `index`."""
        batch = self.gather(self.rows(index))
        if batch.soft is None or self.curriculum is None or self.curriculum.reads_vectors(index):
            return batch
        nowhere_BxL = np.full_like(batch.soft.position_BxL, batch.tokens_BxS.shape[1])
        return batch._replace(soft=batch.soft._replace(position_BxL=nowhere_BxL))

    def alone(self, index: int, row: int) -> Batch:
        """Batch `index` with one of its rows only; the others are padding."""
        batch, others = self(index), self._local_rows[self._shape(self.rows(index)).rows] != row
        for array in jax.tree.leaves(batch):
            array[others] = 0
        batch.length_B[others] = 1
        return batch

    def fill_cache(self, start: int, stop: int) -> None:
        """Fills the activation cache, if there is one, for batches start .. stop-1."""
        if self.cache is not None:
            rows = map(self.rows, range(start, stop))
            self.cache.fill(self.examples.tokens, [(r, *self._shape(r)[:2]) for r in rows])

    def _shape(self, rows: np.ndarray) -> BatchShape:
        return self.shapes[self.bucket_of_example[rows[0]]]

    def _here(self, rows: np.ndarray) -> np.ndarray:
        """Which rows of a batch this process makes, padding left out: indices."""
        local = self._local_rows[self._shape(rows).rows]
        return local[local < rows.size]

    def gather(self, rows: np.ndarray) -> Batch:
        """Pads examples of one bucket, up to its rows, to its shape; this process' rows."""
        assert self.store is not None
        examples, shape = self.examples, self._shape(rows)
        here = self._here(rows)
        weight_B = None if self.row_weights is None else self.row_weights(rows)[here]
        rows = rows[here]
        cf = examples.cf_position
        vectors = self.store.read(cf.take(rows).values)
        cf_BxPxD = np.zeros((rows.size, shape.titles, vectors.shape[1]), np.float32)
        titled = np.arange(shape.titles) < cf.lengths[rows][:, None]
        cf_BxPxD[titled] = vectors
        weighted = np.arange(shape.positions) < examples.position.lengths[rows][:, None]
        batch = Batch(
            tokens_BxS=examples.tokens.pad(rows, shape.tokens, 0),
            length_B=examples.tokens.lengths[rows].astype(np.int32),
            targets=Targets(
                position=examples.position.pad(rows, shape.positions, 0),
                label=examples.label.pad(rows, shape.positions, 0),
                weight=weighted.astype(np.float32),
                title_weight=titled.astype(np.float32),
                decisions=examples.decisions.pad(rows, shape.decisions),
            ),
            cf_BxPxD=cf_BxPxD,
            frozen_BxSxD=self.cache and self.cache.read(examples.tokens, rows, shape.tokens),
            soft=self.soft and self.soft(rows, shape.tokens),
        )
        if weight_B is not None:
            batch = batch._replace(targets=_weighted(batch.targets, weight_B[:, None]))
        batch = jax.tree.map(partial(pad_rows, rows=self._local_rows[shape.rows].size), batch)
        batch.length_B[rows.size :] = 1  # a row of no tokens has no softmax
        return batch

    def iterator(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches start .. stop-1, read ahead by grain; call `fill_cache` before."""
        numbers = grain.MapDataset.range(start, stop)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(numbers.map(self).to_iter_dataset(options))


@lru_cache(maxsize=2)
def _epoch_order(batches: Batches, epoch: int) -> list[np.ndarray]:
    rng = np.random.default_rng([batches._seed, epoch])
    order = rng.permutation(len(batches.examples))
    groups = []
    for bucket, (size, *_) in enumerate(batches.shapes):
        rows = order[batches.bucket_of_example[order] == bucket]
        groups += [rows[i : i + size] for i in range(0, rows.size, size)]
    return [groups[i] for i in rng.permutation(len(groups))]


def mean_of_means(count_R: np.ndarray, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Weights of a batch's rows with which its mean is that of the means over `size` rows each.

    So gradient accumulation averages in transformers' Trainer. `count_R` (int) is what an example
    has of what is averaged: supervised positions, or decisions.
    """

    def row_weights(rows_B: np.ndarray) -> np.ndarray:
        count_B = count_R[rows_B]
        sums = np.add.reduceat(count_B, np.arange(0, count_B.size, size))
        weights = count_B.sum() / (sums.size * np.maximum(sums, 1))
        return np.repeat(weights, size)[: count_B.size].astype(np.float32)

    return row_weights


def _weighted(targets: Targets, weight_Bx1: np.ndarray) -> Targets:
    """With rows that count so often (float32), in the loss and in what it is divided by."""
    decisions = targets.decisions._replace(weight=targets.decisions.weight * weight_Bx1)
    return targets._replace(weight=targets.weight * weight_Bx1, decisions=decisions)


def _bucket_shape(examples: Examples, inside: np.ndarray, rows: int, tokens: int) -> BatchShape:
    def largest(ragged):
        most = int(ragged.lengths[inside].max())
        return round_up(most, 8) if most > 1 else 1  # one target a row: one projection a row

    fields = examples.position, examples.cf_position, examples.decisions.node
    return BatchShape(rows, tokens, *map(largest, fields))
