"""Batches of one shape against the whole."""

import jax
import numpy as np
import pytest

from tca4rec_jax.batching import map_batches


@pytest.mark.parametrize(("rows", "size"), [(23, 5), (20, 5), (3, 5), (1, 1), (0, 5)])
def test_every_row_once_in_batches_of_one_shape(rows, size):
    shapes = set()

    @jax.jit
    def program(values_BxD, add_B):  # traced once for each shape
        shapes.add((values_BxD.shape, add_B.shape))
        return values_BxD.sum(axis=1), {"sum": values_BxD + add_B[:, None]}

    values_RxD = np.arange(4.0 * rows, dtype=np.float32).reshape(rows, 4)
    add_R = np.arange(rows, dtype=np.float32)
    total_R, rest = map_batches(program, values_RxD, add_R, batch_size=size)
    np.testing.assert_array_equal(total_R, values_RxD.sum(axis=1))
    np.testing.assert_array_equal(rest["sum"], values_RxD + add_R[:, None])
    assert len(shapes) == 1
