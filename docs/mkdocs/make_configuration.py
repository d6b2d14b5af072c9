"""Writes docs/configuration.md: every field of a run, its default and what it is.

    .venv/bin/python docs/mkdocs/make_configuration.py

tests/docs/test_configuration.py fails if the page is older than the config.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from tca4rec_jax import config

PAGE = Path(__file__).parents[1] / "configuration.md"
HEAD = """\
# Configuration

`docs/mkdocs/make_configuration.py` makes this page from the defaults in `tca4rec_jax/config.py`.

A config file in `configs/` starts from these defaults and changes what it is for. A field can be
set in the file, in the file's argument and by a flag. The flag wins over the argument, the argument
over the file.

```bash
python launch/train.py --config=configs/quickstart.py --workdir=runs/x --config.training.steps=500
python launch/train.py --config=configs/quickstart.py:alpha=0.3,training.steps=500 --workdir=runs/x
python launch/train.py --config=configs/quickstart.py:debug --workdir=runs/x   # under a minute
```

The argument after the colon is a list of `debug`, dotted fields and the short names {short}. An
unknown field is an error.
"""


def fields() -> Iterator[tuple[str, object, str]]:
    """(dotted field, default, what it is), in the order of the config."""
    source = inspect.getsource(config.default_config)
    lines = source.splitlines()
    tree = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict))
    yield from _fields_of(tree, "", lines)


def _fields_of(tree: ast.Dict, prefix: str, lines: list[str]) -> Iterator[tuple[str, object, str]]:
    for key, value in zip(tree.keys, tree.values, strict=True):
        name = prefix + key.value
        if isinstance(value, ast.Dict):
            yield from _fields_of(value, f"{name}.", lines)
            continue
        above = []
        at = key.lineno - 2
        while lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip("# "))
            at -= 1
        beside = lines[value.end_lineno - 1].partition("  # ")[2]
        default = config.config_value(config.default_config(), name)
        yield name, default, " ".join([*above, beside]).strip()


def page() -> str:
    """The whole text of configuration.md."""
    text = HEAD.format(short=", ".join(f"`{name}`" for name in config.SHORT_NAMES))
    section = None
    for name, default, what in fields():
        group = name.rpartition(".")[0]
        if group != section:
            section = group
            text += f"\n## {group or 'the run'}\n\n| field | default | |\n| --- | --- | --- |\n"
        text += f"| `{name}` | `{default!r}` | {what.replace('|', chr(92) + '|')} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
