"""Freed memory goes back to the kernel when it is asked to."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tca4rec_jax.memory import return_freed_pages


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's")
def test_freed_pages_are_returned():
    blocks = [np.ones(8000) for _ in range(2000)]  # 128 MB, too small to be mapped one by one
    last = blocks[-1]  # glibc gives back what is behind it
    del blocks
    kept = resident_megabytes()
    return_freed_pages()
    assert kept - resident_megabytes() > 100
    assert last.sum() == 8000
