"""Settings of every test process: CPU only, two devices, explicit rank promotion.

The tests in eight_devices need a process of their own (test_mesh.py starts it).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TQDM_DISABLE", "1")
# Programs are compiled, not run for long: without the expensive passes tests take 0.7 of the time,
# and with the old way of emitting fusions 0.7 of that.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false"
)

import jax

DEVICES = int(os.environ.get("TCA4REC_TEST_DEVICES", "2"))
collect_ignore = [] if DEVICES == 8 else ["eight_devices"]

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that the cores run out of work together (launch/test.sh)."""
    slow = [item.path for item in items if item.get_closest_marker("slow")]
    items.sort(key=lambda item: (-slow.count(item.path), item.path))
