"""When a process joins others, and what it does alone."""

import socket

import jax
import numpy as np
import pytest
from forked import Script

from tca4rec_jax.distributed import multihost

SLURM = {
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ""),  # a batch script outside srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | POD, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        (POD, "Kubernetes"),
    ],
)
def test_clusters_are_told_by_the_environment(environment, name):
    assert multihost.detect_cluster({"TPU_SKIP_MDS_QUERY": "1"} | environment) == name


def test_a_tpu_machine_is_one_where_jax_found_chips(monkeypatch):
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert multihost.detect_cluster({}) == "Cloud TPU"
    # jax sets the variable where there are no chips.
    assert multihost.detect_cluster({"TPU_SKIP_MDS_QUERY": "1"}) == ""
    assert multihost.detect_cluster({"JAX_PLATFORMS": "cpu"}) == ""


def test_a_plain_process_tries_nothing(monkeypatch):
    def initialize(*_, **__):
        raise AssertionError("jax.distributed.initialize was called")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in SLURM | POD:
        monkeypatch.delenv(name, raising=False)
    multihost.join_job()
    multihost.join_job(count=1)
    assert multihost.is_main_process()
    assert not multihost.is_multiprocess()
    for wrong in (("host:1", 2, -1), ("host", 2, 0), ("host:1", 2, 2), ("", 2, 0), ("", 2, -1)):
        with pytest.raises(ValueError, match="several processes need --coordinator=HOST:PORT"):
            multihost.join_job(*wrong)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"])
def test_under_mpirun_and_torchrun_processes_do_not_train_one_run_each(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name}=2: .* has started several processes"):
        multihost.join_job()
    multihost.join_job(count=1)
    monkeypatch.setenv(name, "1")
    multihost.join_job()


def test_a_pod_that_cannot_count_its_fellows_says_what_to_do(monkeypatch):
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install .jax\[k8s\]."):
        multihost.join_job()
    multihost.join_job(count=1)


def test_parts_of_all_processes_make_every_row_once(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    parts = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(multihost.process_rows(8))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(8))
    assert [part.size for part in parts] == [3, 3, 2]

    monkeypatch.setattr(multihost, "is_multiprocess", lambda: True)
    gathered = []

    def allgather(padded):
        gathered.append(padded)
        return np.stack([np.pad(10 * part, (0, 3 - part.size)) for part in parts])

    monkeypatch.setattr(multihost.multihost_utils, "process_allgather", allgather)
    np.testing.assert_array_equal(
        multihost.gather_process_rows(10 * parts[2], 8), 10 * np.arange(8)
    )
    assert gathered[0].shape == (3,)  # padded to the largest part


BARRIERS = """
import sys, time
from tca4rec_jax.distributed.multihost import barrier, join_job, leave_job
index = int(sys.argv[2])
join_job(sys.argv[1], 2, index)
for _ in range(3):
    began = time.monotonic()
    time.sleep(0.5 * index)
    barrier("the same name", seconds=30)
    assert time.monotonic() - began > 0.3
leave_job()
print("done")
"""


def two_processes(path, text):
    """What two processes that run a script of this text have printed."""
    path.write_text(text)
    with socket.socket() as one:
        one.bind(("localhost", 0))
        coordinator = f"localhost:{one.getsockname()[1]}"
    both = [Script([str(path), coordinator, index], {}, devices=1) for index in "01"]
    return [script.completed(60) for script in both]


def test_barriers_of_one_name_wait_each_time(tmp_path):
    for done in two_processes(tmp_path / "barriers.py", BARRIERS):
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("done\n")


DEAD = """
import os, sys
from tca4rec_jax.distributed import multihost
multihost._HEARTBEAT_SECONDS = 3
index = int(sys.argv[2])
multihost.join_job(sys.argv[1], 2, index)
multihost.barrier("both are there")
if index == 1:
    os._exit(9)
multihost.check_processes_agree("text", "flags")
print("went on")
"""


def test_a_process_does_not_wait_for_one_that_has_died(tmp_path):
    waiting, dead = two_processes(tmp_path / "dead.py", DEAD)
    assert dead.returncode == 9
    assert waiting.returncode not in (0, 9)
    assert "went on" not in waiting.stdout
