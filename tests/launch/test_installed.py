"""What is declared, locked and installed: a wheel of this checkout, used from another folder."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tca4rec_jax.decoding.trie_export import CODE

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
IN_WHEEL = {"tca4rec_jax": "tca4rec_jax", "configs": "tca4rec_jax/configs"}
CONFIG = "--config=quickstart:debug,alpha=0.3"
WHOLE = {"beam"}  # extras whose lock is installed alone
IMPORTED_IF_ASKED = {"apache_beam": "beam"}  # modules, and the extras that have them


def requirements():
    """Of requirements.txt, which pyproject.toml reads; every line says why."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert all(" # " in line for line in listed)
    return [Requirement(line.partition("#")[0]) for line in listed]


def locked(name):
    """Package -> releases of a lock, each with its hashes."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "launch" / "locks" / f"{name}.txt").read_text()
    for entry in re.split(r"\n(?=[a-z])", text):
        package, release = re.match(r"([\w-]+)==(\S+)", entry).groups()
        assert "--hash=sha256:" in entry
        found.setdefault(package, []).append(release)
    return found


def third_party(folder):
    """Packages that the Python files of a folder import, but what runs in other projects."""
    path = ROOT / folder
    files = path.glob("**/*.py") if path.is_dir() else [path] * (path.suffix == ".py")
    files = [file for file in files if file.name != CODE]
    trees = [ast.parse(file.read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"tca4rec_jax"}


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_the_locks_have_what_is_declared(extra):
    run = {} if extra in WHOLE else locked("run")
    wanted = [Requirement(line) for line in EXTRAS[extra]] if extra else []
    wanted += requirements() if not extra or extra in WHOLE else []
    releases = run | locked(extra) if extra else run
    for requirement in wanted:
        for release in releases[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(release), requirement
    if extra:  # two locks are installed together
        both = run.keys() & locked(extra).keys()
        assert all(run[package] == locked(extra)[package] for package in both)


def test_what_the_package_imports_is_declared():
    of_module = importlib.metadata.packages_distributions()
    parts = {"serving": EXTRAS["serve"]}  # imported by its script alone
    folders = {path.name for path in (ROOT / "tca4rec_jax").iterdir() if path.name not in parts}
    modules = {f"tca4rec_jax/{name}": [] for name in folders} | {"configs": []}
    modules |= {f"tca4rec_jax/{name}": extra for name, extra in parts.items()}
    for folder, extra in modules.items():
        listed = [*requirements(), *map(Requirement, extra)]
        declared = {canonicalize_name(requirement.name) for requirement in listed}
        for module in third_party(folder) - IMPORTED_IF_ASKED.keys():
            assert declared & {canonicalize_name(name) for name in of_module[module]}, module


def test_what_is_imported_if_asked_for_is_declared():
    for module, extra in IMPORTED_IF_ASKED.items():
        declared = {canonicalize_name(Requirement(line).name) for line in EXTRAS[extra]}
        assert canonicalize_name(module) in declared


def test_tests_and_documentation_are_no_run_time_requirement():
    listed = [Requirement(line).name for name in ("test", "docs") for line in EXTRAS[name]]
    assert not {canonicalize_name(name) for name in listed} & locked("run").keys() - {
        "pyyaml",
        "httpx2",
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the files of this checkout, by `pip wheel` without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("tca4rec_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", source)
    (path,) = folder.glob("*.whl")
    return path


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program of an environment with this wheel and, by path, with the other
    packages of this one, from an empty folder: its (exit status, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    paths = sysconfig.get_paths(vars={"base": str(folder / "venv")})
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(paths["purelib"], "others.pth").write_text("\n".join(others))
    pip("--python", folder / "venv" / "bin" / "python", "install", "--no-deps", wheel)
    (folder / "empty").mkdir()

    def run(program, *arguments):
        done = subprocess.run(
            [folder / "venv" / "bin" / program, *arguments],
            cwd=folder / "empty", capture_output=True, text=True, timeout=300,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
def test_the_wheel_holds_package_scripts_configs_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in IN_WHEEL.items():
        files = [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".txtpb", ".html")]
        assert {f"{place}/{file.relative_to(ROOT / folder)}" for file in files} <= names
    scripts = {f"tca4rec_jax/launch/{file.name}" for file in (ROOT / "launch").glob("*.py")}
    assert {name for name in names if "/launch/" in name} == scripts
    with zipfile.ZipFile(wheel) as file:
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = file.read(f"{info}/METADATA").decode()
        licence = file.read(f"{info}/licenses/LICENSE").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "END OF TERMS AND CONDITIONS" in licence
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert {str(Requirement(line)) for line in needed} == {str(line) for line in requirements()}
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.MULTILINE)) == EXTRAS.keys()


@pytest.mark.slow
def test_an_installed_package_is_used_from_any_folder(installed):
    code = (
        "import tca4rec_jax; from tca4rec_jax import Recommender, tca_loss; "
        "from tca4rec_jax.errors import UserError; print(tca4rec_jax.__file__)\n"
        "try: Recommender.load('absent', 'run')\nexcept (UserError, OSError) as error: print(error)"
    )
    status, out, err = installed("python", "-c", code)
    assert status == 0, err
    file, message = out.splitlines()
    assert "/venv/lib/" in file
    assert "does not exist" in message
    assert "PyTorch was not found" not in err


@pytest.mark.slow
def test_every_script_is_a_command(installed):
    status, out, _ = installed("tca4rec", "--help")
    assert status == 0
    for script in (ROOT / "launch").glob("[!_]*.py"):
        assert f"\n  {script.stem} " in out
    assert "cf/sasrec_published" in out
    assert "quickstart" in out
    assert installed("tca4rec")[1] == out
    status, _, err = installed("tca4rec", "fly")
    assert status == 1
    assert err.startswith("tca4rec: there is no command fly: expected one of compare, compile_")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.replace("quickstart", "configs/quickstart.py"), CONFIG.split("=", 1)]
)
def test_a_command_takes_an_installed_config(installed, config):
    config = config if isinstance(config, list) else [config]
    status, out, err = installed("tca4rec", "train", "--dry_run", *config, "--workdir=x")
    assert status == 0, err
    assert out.startswith("train: the config is valid")
    assert "writes x/llm/alpha_0.3" in out


@pytest.mark.slow
def test_a_command_has_help_and_ends_as_its_script_does(installed):
    status, out, _ = installed("tca4rec", "prepare_data", "--helpshort")
    assert "--workdir" in out
    assert "Prepares the data of a run" in out
    status, _, err = installed("tca4rec", "train", "--config=no_such", "--workdir=x")
    assert status == 1
    assert err.startswith("train: ")
    assert len(err.strip().splitlines()) == 1
