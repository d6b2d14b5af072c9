"""Jobs of several processes, one per host (or per GPU): joining them, and what they do together.

Every process runs the same program. What one of them does alone (a file, a progress bar) is behind
`is_first`; what they do together (anything named here but that, every step on the mesh, every
checkpoint) is done by all of them in the same order. In a single process all of it is trivial.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tca4rec_jax.errors import UserError

# A process that does not answer for so long is taken for dead, and the others end. Seconds.
_HEARTBEAT = 30


def join(coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Connects this process to the others of its job; call before any use of a device.

    With the three arguments, or without any where a cluster is found (`cluster`). Otherwise this is
    a plain single process, and nothing is tried; so it is with count = 1 alone.

    Args:
      coordinator: host:port of process 0, the same for all.
      count: how many processes there are.
      index: which of them this is.

    Raises:
      UserError: some of the three are missing or out of range, or a cluster whose processes
        cannot be counted.
    """
    given = bool(coordinator), count > 0, index >= 0
    if given == (False, True, False) and count == 1:
        return
    if any(given):
        if not all(given) or index >= count or ":" not in coordinator:
            raise UserError(
                "several processes need --coordinator=HOST:PORT of process 0, --process_count=N "
                f"and --process_index=0..N-1, got {coordinator!r}, {count} and {index}"
            )
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    elif name := cluster(os.environ):
        if name == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes job, but the package that counts its pods "
                'is missing: pip install "jax[k8s]", or give --coordinator, --process_count and '
                "--process_index, or --process_count=1 for a process of its own"
            )
        logging.info("Joining the other processes (%s)", name)
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT)
    else:
        return
    logging.info(
        "Process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


def cluster(environment: Mapping[str, str]) -> str:
    """The kind of cluster whose job this process is a part of, from its environment; '' if none.

    jax.distributed.initialize then finds out the rest by itself. Nothing is asked over a network.
    """
    slurm = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts:
        return "GKE"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys() and not hosts:
        return "Kubernetes"
    # jax sets the variable when it is imported on a machine that has no TPU.
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu"
    tpu = "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu")
    return "Cloud TPU" if tpu and not on_cpu and not hosts else ""


def leave() -> None:
    """Leaves the job when all the others do, before an exit that all have agreed on.

    Those that went on for a moment longer would take the first one to end for dead.
    """
    if several():
        jax.distributed.shutdown()


def several() -> bool:
    """Whether this is one of several processes; asks no device if it is not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes files, logs and progress."""
    return not several() or jax.process_index() == 0


def wait_for_all(name: str, seconds: float = 600) -> None:
    """Returns when every process has come here, each name once; raises after so long.

    Over the network of the coordinator, not over devices, whose collectives expect to be joined at
    once.
    """
    if several():
        from orbax.checkpoint import multihost  # takes a second, which most scripts can do without

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(1000 * seconds))


def everywhere(flag: bool) -> bool:
    """Whether the flag is true in every process."""
    return bool(flag) if not several() else bool(multihost_utils.process_allgather(flag).all())


def from_first(compute: Callable[[], bytes], size: int) -> bytes:
    """What compute() returns (`size` bytes) in the first process; it is called there only."""
    value = np.frombuffer(compute(), np.uint8) if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(value), np.uint8))


def check_same(digest: bytes, what: str) -> None:
    """Raises UserError in every process if they have not the same digest of `what`."""
    if not several():
        return
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differ = np.flatnonzero((digests != digests[0]).any(axis=1))
    if differ.size:
        raise UserError(
            f"process {differ[0]} has not the same {what} as process 0: give all processes the "
            "same flags, and a work directory that all of them see"
        )


def fetch(tree):
    """Arrays on the mesh as NumPy arrays, whole, in every process."""
    return (
        multihost_utils.process_allgather(tree, tiled=True) if several() else jax.device_get(tree)
    )


def own_part(count: int) -> np.ndarray:
    """int64: which of `count` rows this process works on; all of them in a single process."""
    return np.array_split(np.arange(count), jax.process_count())[jax.process_index()]


def join_parts(tree, count: int):
    """The rows that every process has worked out for its `own_part`, put together everywhere.

    Args:
      tree: arrays [own rows, ...].

    Returns:
      The same with `count` rows.
    """
    if not several():
        return tree
    sizes = [len(part) for part in np.array_split(np.arange(count), jax.process_count())]
    most = max(sizes)

    def joined(array):
        array = np.asarray(array)
        padding = [(0, most - len(array))] + [(0, 0)] * (array.ndim - 1)
        parts = multihost_utils.process_allgather(np.pad(array, padding)).astype(array.dtype)
        return np.concatenate([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return jax.tree.map(joined, tree)
