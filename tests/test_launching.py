"""The start of a process: what large temporaries cost after the first calls."""

import os
import platform
import subprocess
import sys

import pytest

# As a launch script: `launching` first, then what starts threads (pandas, by Arrow), then JAX.
# Every device has a temporary of 64 MB; prints the page faults of the best of the later calls.
_SCRIPT = """
import resource
from tca4rec_jax.launching import keep_freed_pages
import pandas
import pyarrow
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
keep_freed_pages()
jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

def program(x, times):
    big = jax.lax.fori_loop(0, times, lambda _, big: big + 1, jnp.broadcast_to(x, (4096, 4096)))
    return jnp.sum(big, keepdims=True)

rows, everywhere = PartitionSpec("data"), PartitionSpec()
run = jax.jit(
    jax.shard_map(program, mesh=mesh, in_specs=(rows, everywhere), out_specs=rows))
x = jnp.ones((4, 1))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x, 2).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[3:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_every_devices_temporaries_keep_their_pages():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, env=environment
    )
    one_devices_pages = 4 * 4096 * 4096 // os.sysconf("SC_PAGE_SIZE")
    assert int(done.stdout) < one_devices_pages // 2
