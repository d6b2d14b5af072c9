"""Rows in batches of one static shape, so that a jitted program is compiled once."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


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
