"""Settings of every test process: CPU only, two devices, explicit rank promotion.

The tests in eight_devices need a process of their own (distributed/test_sharding.py starts it).
Those that need one device run on a GPU too:
TCA4REC_TEST_PLATFORM=cuda bash launch/test.sh -n 0 tests/llm ...
"""

import collections
import contextlib
import os
import sys
from pathlib import Path

PLATFORM = os.environ["JAX_PLATFORMS"] = os.environ.get("TCA4REC_TEST_PLATFORM", "cpu")
if PLATFORM == "cpu":
    # Programs are compiled, not run for long: without the expensive passes tests take 0.7 of the
    # time, and with the old way of emitting fusions 0.7 of that. In one part a small program is
    # compiled in 0.6 of the time.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
# Programs do not say which lines they are from: less work to trace and lower large ones.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest

from tca4rec_jax.memory import collect_garbage_rarely

sys.path.insert(0, str(Path(__file__).parent))
import drawing
from forked import keep_programs

DEVICES = int(os.environ.get("TCA4REC_TEST_DEVICES", "2"))
collect_ignore = [] if DEVICES == 8 else ["eight_devices"]

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", DEVICES)
else:  # whose products of float32 are of a lower precision by default
    jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_rank_promotion", "raise")
collect_garbage_rarely()
keep_programs(first="PYTEST_XDIST_WORKER" not in os.environ and DEVICES != 8)


@pytest.fixture(autouse=True, scope="module")
def undrawn(request):
    """No picture is drawn but in modules with the mark `drawn`, and in tests that ask for it."""
    marked = request.node.get_closest_marker("drawn")
    with contextlib.nullcontext() if marked else drawing.undrawn():
        yield


@pytest.fixture
def drawn():
    """The pictures of this test are drawn."""
    with drawing.drawn():
        yield


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that the cores run out of work together (launch/test.sh).

    A slow test counts for ten seconds, or for those that its mark gives.
    """
    seconds = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("slow"):
            seconds[item.path] += mark.args[0] if mark.args else 10
    items.sort(key=lambda item: (-seconds[item.path], item.path))
