"""The notebooks of docs/notebooks run from top to bottom, on a tiny LLM."""

import copy
import os
import tomllib
from importlib.machinery import ModuleSpec

import nbformat
import pages
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_workdir import make_workdir

from tca4rec_jax.data.downloads import default_cache_dir

NOTEBOOKS = sorted((pages.ROOT / "docs/notebooks").glob("*.ipynb"))
# Follows the cell with the tag `parameters`: a random LLM with a tokenizer of letters, 12 items.
TINY = """
from tiny_workdir import make_config
config = make_config(Path({folder!r}), "aligned")
config.prompt.max_tokens, config.training.buckets = 48, (48,)
config.training.update(batch_size=2, steps=3)
history, compare = ["aa", "bb", "cc"], ("da", "eb")
"""


def read(path):
    return nbformat.read(path, as_version=4)


def sources(notebook, kind="code"):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def shrunk(notebook, folder):
    """With a cell that makes the config of the cell before it a tiny one."""
    cells = []
    for cell in copy.deepcopy(notebook.cells):
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            cells.append(nbformat.v4.new_code_cell(TINY.format(folder=str(folder))))
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a notebook; all of them in one kernel, which imports and compiles once."""
    folder, tiny = tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("tiny")
    make_workdir(tiny)
    paths = os.pathsep.join([str(pages.ROOT), str(pages.ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(default_cache_dir() / "compiled_tests")
    manager, client = start_new_kernel(cwd=str(folder), env=environment)

    def run_notebook(path):
        notebook = shrunk(read(path), tiny)
        executor = NotebookClient(notebook, km=manager, timeout=300)
        executor.kc = client
        executor.execute(reset_kc=False)
        return notebook

    yield run_notebook
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs(notebook):
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in found)
    kinds = {kind for output in found for kind in output.get("data", ())}
    return text, kinds


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_a_picture(path, run):
    text, kinds = outputs(run(path))
    assert "image/png" in kinds
    said = {
        "quickstart": "untrained, lambda = 1",
        "own_data": "['assam', 'chai'] ->",
        "own_training_step": "loss ",
        "explain": "The decoding tree",
    }
    assert said[path.stem] in text
    assert ("text/html" in kinds) == (path.stem in ("own_data", "explain"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_without_outputs_and_installs_the_project(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert len({sources(read(other))[0] for other in NOTEBOOKS}) == 1
    assert path.name in (pages.ROOT / "docs/notebooks.md").read_text()


@pytest.mark.parametrize("found", [None, ModuleSpec("tca4rec_jax", None), "installed"])
def test_the_first_cell_installs_the_project_where_it_is_none_yet(found, monkeypatch, capsys):
    """Not where a folder of that name, such as a clone that is not installed, is all there is."""
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    if found != "installed":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    exec(sources(read(NOTEBOOKS[0]))[0], {})
    if found == "installed":
        assert not commands
        return
    ((*pip, project),) = commands
    wanted, declared = (
        Requirement(project),
        tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"],
    )
    assert pip[1:4] == ["-m", "pip", "install"]
    assert canonicalize_name(wanted.name) == declared["name"]
    assert wanted.extras <= {*declared["optional-dependencies"]}
    assert "Restart session" in capsys.readouterr().out


def test_the_own_training_step_is_the_example_of_the_readme():
    (block,) = pages.code_blocks(pages.README.read_text(), "python")
    code = "\n".join(sources(read(pages.ROOT / "docs/notebooks/own_training_step.ipynb")))
    lines = [line for line in block.splitlines() if line.strip()]
    assert [line for line in code.splitlines() if line in lines and line.strip()] == lines
