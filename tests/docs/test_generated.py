"""What docs/ holds of generated files is up to date, and the docstrings name real parameters."""

import ast
import re
import runpy

import pages

from tca4rec_jax.config import config_fields


def test_the_configuration_page_is_up_to_date():
    made = runpy.run_path(str(pages.ROOT / "docs/mkdocs/make_configuration.py"))
    assert made["PAGE"].read_text() == made["page"](), (
        "run .venv/bin/python docs/mkdocs/make_configuration.py"
    )


def test_every_field_is_explained():
    assert not [name for name, field in config_fields().items() if not field.description.strip()]


def test_the_picture_is_up_to_date():
    made = runpy.run_path(str(pages.ROOT / "docs/images/make_collaborative_tokenizer.py"))
    assert made["PICTURE"].read_text("utf-8") == made["picture"]()


def test_the_api_reference_has_every_module():
    source = (pages.ROOT / "docs/mkdocs/api_pages.py").read_text()
    names = {"Path": type(pages.ROOT), "ROOT": pages.ROOT, "PACKAGE": "tca4rec_jax"}
    tree = ast.parse(source)
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "pages"]
    exec(compile(ast.Module([function], []), "pages", "exec"), names)
    listed = {module for modules in names["pages"]().values() for module in modules}
    assert "tca4rec_jax.core.trie" in listed
    assert len(listed) == len(list((pages.ROOT / "tca4rec_jax").rglob("*.py")))


def wrong_parameters(source: str) -> list[str]:
    """Names in the Args of docstrings that are no parameters of their function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        section = re.search(r"^Args:\n((?:  .*\n?|\n)+)", ast.get_docstring(node), re.MULTILINE)
        if not section:
            continue
        every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        known = {a.arg for a in (*every, node.args.vararg, node.args.kwarg) if a}
        for names in re.findall(r"^  (\S[^:\n]*):", section[1], re.MULTILINE):
            for name in re.split(r",\s*", names):
                if name.strip("*`") not in known:
                    found.append(f"{node.name} has no parameter {name}")
    return found


def test_docstrings_name_real_parameters():
    files = sorted((pages.ROOT / "tca4rec_jax").rglob("*.py"))
    wrong = {str(file): wrong_parameters(file.read_text()) for file in files}
    assert not {file: names for file, names in wrong.items() if names}


def test_a_wrong_parameter_is_found():
    source = 'def f(a, *, b):\n    """F.\n\n    Args:\n      a, b: fine.\n      c: gone.\n    """\n'
    assert wrong_parameters(source) == ["f has no parameter c"]
