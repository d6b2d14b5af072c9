"""Rows in batches of few static shapes, so that each is compiled once."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below a value."""
    return int(-(-value // multiple) * multiple)


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """The array [R, ...] with rows of zeros after its own: [rows, ...]."""
    missing = rows - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array


def map_batches(program: Callable, *arrays: Any, batch_size: int) -> Any:
    """Runs a jitted program on the rows of arrays, one batch of a fixed size after another.

    The program gives a tree of arrays [B, ...] for arrays [B, ...]. Those passed are [R, ...],
    whatever has a length and is sliced by rows. B is `batch_size`, or R if that is smaller; the
    last batch is padded with zeros. Returns the tree as NumPy arrays [R, ...].
    """
    num_rows = len(arrays[0])
    size = min(batch_size, max(num_rows, 1))
    parts = []
    for start in range(0, max(num_rows, 1), size):
        batch = [np.asarray(array[start : start + size]) for array in arrays]
        padded = [pad_rows(array, size) for array in batch]
        outputs = jax.tree.map(np.asarray, program(*padded))
        parts.append(jax.tree.map(operator.itemgetter(slice(len(batch[0]))), outputs))
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


def in_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] -> [chunks, chunk, ...], padded with zeros; traceable."""
    chunks = -(-array.shape[0] // chunk)
    widths = [(0, chunks * chunk - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths).reshape(chunks, chunk, *array.shape[1:])


def sum_over(function: Callable[..., Any], xs: tuple) -> Any:
    """The sum of function(*x), a tree of float32, over the leading axis of xs: one x at a time."""

    def add(sums, x):
        return jax.tree.map(jnp.add, sums, function(*x)), None

    one = jax.tree.map(lambda a: a[0], xs)
    zeros = jax.tree.map(lambda sum_: jnp.zeros(sum_.shape), jax.eval_shape(function, *one))
    return jax.lax.scan(add, zeros, xs)[0]


def bucket_lengths(lengths_R: np.ndarray, count: int) -> np.ndarray:
    """At most `count` padded lengths, multiples of eight, with the least padding in all."""
    width_W, rows_W = np.unique(-(-lengths_R // 8) * 8, return_counts=True)
    below = np.concatenate([[0], np.cumsum(rows_W)])

    @functools.cache
    def best(stop: int, count: int) -> tuple[int, tuple[int, ...]]:
        """(padded length of all rows, the buckets) of the first `stop` widths."""
        if not stop:
            return 0, ()
        options = []
        for start in range(stop if count > 1 else 1):
            length, buckets = best(start, count - 1)
            length += width_W[stop - 1] * (below[stop] - below[start])
            options.append((length, (*buckets, width_W[stop - 1])))
        return min(options, key=lambda option: option[0])

    return np.array(best(width_W.size, count)[1], np.int64)
