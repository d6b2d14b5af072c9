"""The Python in README and docs runs."""

import ast
import sys
from types import FunctionType
from unittest.mock import create_autospec

import pages
import pytest

from tca4rec_jax.data.dataset import prepare
from tca4rec_jax.decoding import trie_logits_processor


def blocks(language: str) -> list:
    """(page, block) parameters; ```python blocks run alone, ```py ones need a work directory."""
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in pages.PAGES
        for number, block in enumerate(pages.code_blocks(page.read_text(), language))
    ]


def run_with_signatures(source: str) -> None:
    """Runs a block whose imports are real and whose calls only have their signatures checked."""
    tree, names = ast.parse(source), {}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    for name, value in list(names.items()):
        if isinstance(value, type):
            names[name] = create_autospec(value)
            for member, function in vars(value).items():
                if isinstance(function, classmethod):  # taken for a constructor
                    getattr(names[name], member).return_value = create_autospec(
                        value, instance=True
                    )
        elif isinstance(value, FunctionType):
            names[name] = create_autospec(value)
    rest = [node for node in tree.body if node not in imports]
    exec(compile(ast.Module(rest, []), "block", "exec"), names)


@pytest.mark.parametrize("block", blocks("python"))
def test_a_block_runs(block):
    exec(compile(block, "block", "exec"), {})


def test_the_example_of_the_readme_trains():
    (block,) = pages.code_blocks(pages.README.read_text(), "python")
    names = {}
    exec(block, names)
    first = names["train_step"](
        names["jnp"].zeros((2, 4, 12)),
        names["opt_state"],
        *names["batch"],
        names["Objective"](alpha=0.1),
    )[2]
    assert names["value"] < 0.2 * first
    assert names["train_step"]._cache_size() <= 2  # alpha: a weak-typed scalar, traced


@pytest.mark.parametrize(
    "block", [case for case in blocks("py") if "dataset import load" not in case.values[0]]
)
def test_the_calls_of_a_block_exist(block, monkeypatch):
    monkeypatch.setitem(sys.modules, "trie_logits_processor", trie_logits_processor)
    run_with_signatures(block)


@pytest.mark.parametrize(
    "block", [case for case in blocks("py") if "dataset import load" in case.values[0]]
)
def test_prepared_data_are_read_as_shown(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"u{time % 3},i{(time * 7) % 5},{time}" for time in range(60)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    titles = "\n".join(["item,title", *(f"i{item},Title {item}" for item in range(5))])
    (tmp_path / "items.csv").write_text(titles)
    prepare(
        {
            "source": "files",
            "interactions": "interactions.csv",
            "catalogue": "items.csv",
            "history_length": 3,
        },
        "runs/mine/data",
    )
    exec(compile(block, "block", "exec"), {})


def test_a_block_with_a_wrong_call_is_found():
    source = "from tca4rec_jax.decoding.recommender import Recommender\n"
    with pytest.raises(TypeError):
        run_with_signatures(source + 'Recommender.load("runs/x", "y", no_such_argument=1)')
    with pytest.raises(AttributeError):
        run_with_signatures(source + 'Recommender.load("runs/x", "y").no_such_method()')
    with pytest.raises(ImportError):
        run_with_signatures("from tca4rec_jax.decoding.recommender import NoSuchName")
