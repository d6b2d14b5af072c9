"""Writes docs/configuration.md: every field of a run, its default and what it is.

    .venv/bin/python docs/mkdocs/make_configuration.py

tests/docs/test_configuration.py fails if the page is older than the config.
"""

from pathlib import Path

from tca4rec_jax import config

PAGE = Path(__file__).parents[1] / "configuration.md"
HEAD = """\
# Configuration

`docs/mkdocs/make_configuration.py` makes this page of `tca4rec_jax/sections.py`.

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


def page() -> str:
    """The whole text of configuration.md."""
    text = HEAD.format(short=", ".join(f"`{name}`" for name in config.SHORT_NAMES))
    section = None
    for name, default, what in config.describe():
        group = name.rpartition(".")[0]
        if group != section:
            section = group
            text += f"\n## {group or 'the run'}\n\n| field | default | |\n| --- | --- | --- |\n"
        text += f"| `{name}` | `{default!r}` | {what.replace('|', chr(92) + '|')} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
