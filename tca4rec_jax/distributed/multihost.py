"""Jobs of several processes, one per host (or per GPU): joining a job and exchanging host data.

All processes run the same program. A function that communicates is collective: all processes call
it, in the same order as each other and as the steps on the mesh. In a single process nothing is
communicated.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from tca4rec_jax.batching import pad_rows
from tca4rec_jax.errors import UserError
from tca4rec_jax.lease import only_writer

# Variables that hold the number of processes, by what sets them.
_COUNTED_BY = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "WORLD_SIZE": "torchrun",
}
_HEARTBEAT_SECONDS = 30  # a process silent for this long counts as dead, and the others end
_LONGEST_WAIT = 2 * 3600  # seconds, of hosts for one that reads its files slowly, but lives


def join_job(coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Connects process `index` of `count` to its job; call before any use of a device.

    Either all three arguments are given (`coordinator` is host:port of process 0), or none and
    `detect_cluster` finds the job. Otherwise, and with count = 1 alone, this is a plain single
    process and nothing happens. Raises UserError if some of the three are missing or out of range,
    if Kubernetes's client is missing, or under mpirun or torchrun.
    """
    initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
    given = bool(coordinator), count > 0, index >= 0
    if given == (False, True, False) and count == 1:
        return
    if any(given):
        if not all(given) or index >= count or ":" not in coordinator:
            raise UserError(
                "several processes need --coordinator=HOST:PORT of process 0, --process_count=N "
                f"and --process_index=0..N-1, got {coordinator!r}, {count} and {index}"
            )
        initialize(coordinator, count, index, cluster_detection_method="deactivate")
    elif name := detect_cluster(os.environ):
        if name == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes job, but the package that counts its pods "
                'is missing: pip install "jax[k8s]", or give --coordinator, --process_count and '
                "--process_index, or --process_count=1 for a process of its own"
            )
        logging.info("Joining the other processes (%s)", name)
        initialize()
    elif several := next((name for name in _COUNTED_BY if int(os.environ.get(name) or 1) > 1), ""):
        raise UserError(
            f"{several}={os.environ[several]}: {_COUNTED_BY[several]} has started several "
            "processes, which do not find each other by themselves: give --coordinator=HOST:PORT, "
            "--process_count and --process_index, or --process_count=1 if each is on its own"
        )
    else:
        return
    process = jax.process_index(), jax.process_count()
    devices = jax.local_device_count(), jax.device_count()
    logging.info("Process %d of %d, %d of %d devices", *process, *devices)


def detect_cluster(environment: Mapping[str, str]) -> str:
    """The kind of cluster that started this process, from its environment variables; '' if none.

    jax.distributed.initialize then finds the coordinator by itself. No network is used.
    """
    slurm = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environment.keys()
    if slurm and int(environment.get("SLURM_NTASKS", 1)) > 1:
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


def leave_job() -> None:
    """Leaves the job before an exit that all processes agreed on: none is then taken for dead."""
    if is_multiprocess():
        jax.distributed.shutdown()


def is_multiprocess() -> bool:
    """Whether the job has several processes; a single process initialises no device by this."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main_process() -> bool:
    """Whether this is process 0, which writes files, logs and progress."""
    return not is_multiprocess() or jax.process_index() == 0


def barrier(name: str, seconds: float = _LONGEST_WAIT) -> None:
    """Returns when every process has called it; raises after `seconds`. Names may be used again.

    If another process dies meanwhile, this one ends after the heartbeat's half a minute. It goes
    over the coordinator's network: a device collective would time out where processes arrive
    minutes apart.
    """
    if is_multiprocess():
        from orbax.checkpoint import multihost  # slow to import, and most scripts do without it

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(1000 * seconds))


@contextlib.contextmanager
def only_writing_job(path: Path) -> Iterator[None]:
    """`lease.only_writer` of a job: the main process holds the lease, the others wait for it."""
    with only_writer(path) if is_main_process() else contextlib.nullcontext():
        barrier("lease")  # of whatever name each host gives the path
        yield


def all_processes(flag: bool) -> bool:
    """Whether the flag is true in every process."""
    if not is_multiprocess():
        return bool(flag)
    return bool(multihost_utils.process_allgather(flag).all())


def broadcast_from_main(compute: Callable[[], bytes], size: int) -> bytes:
    """Calls compute() in process 0 only and returns its `size` bytes in every process."""
    value = np.frombuffer(compute(), np.uint8) if is_main_process() else np.zeros(size, np.uint8)
    barrier("computed by the first process")
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(value), np.uint8))


def check_processes_agree(text: str, what: str) -> None:
    """Raises UserError in every process if their texts of `what` differ."""
    if not is_multiprocess():
        return
    digest = hashlib.sha256(text.encode()).digest()
    barrier(what)  # what comes before may take minutes longer on one host: reading, hashing
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differ = np.flatnonzero((digests != digests[0]).any(axis=1))
    if differ.size:
        raise UserError(
            f"process {differ[0]} has not the same {what} as process 0: give all processes the "
            "same flags, and a work directory that all of them see"
        )


def gather_to_host(tree: Any) -> Any:
    """The arrays of a tree as complete NumPy arrays, in every process."""
    if is_multiprocess():
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def process_rows(count: int) -> np.ndarray:
    """int64: this process's contiguous share of the rows 0..count-1."""
    return np.array_split(np.arange(count), jax.process_count())[jax.process_index()]


def gather_process_rows(tree: Any, count: int) -> Any:
    """Joins arrays [this process's rows, ...] for `process_rows(count)` to [count, ...]."""
    if not is_multiprocess():
        return tree
    sizes = [len(part) for part in np.array_split(np.arange(count), jax.process_count())]
    inside = np.arange(max(sizes)) < np.array(sizes)[:, None]

    def join(array):
        parts = multihost_utils.process_allgather(pad_rows(np.asarray(array), max(sizes)))
        return parts.astype(array.dtype)[inside]

    return jax.tree.map(join, tree)
