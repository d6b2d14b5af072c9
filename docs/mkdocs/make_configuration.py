"""Writes docs/configuration.md: every field of a run, its default, its range and what it is.

    .venv/bin/python docs/mkdocs/make_configuration.py

tests/docs/test_generated.py fails if the page is older than the dataclasses.
"""

from pathlib import Path

from tca4rec_jax.config import SHORT_NAMES, config_fields
from tca4rec_jax.ranges import range_words

PAGE = Path(__file__).parents[1] / "configuration.md"
HEAD = """\
# Configuration

`docs/mkdocs/make_configuration.py` makes this page from the dataclasses that hold the defaults.

A config file in `configs/` starts from these defaults and changes what it is for. A field can be
set in the file, in the file's argument and by a flag. The flag wins over the argument, the argument
over the file.

```bash
python launch/train.py --config=configs/quickstart.py --workdir=runs/x --config.training.steps=500
python launch/train.py --config=configs/quickstart.py:alpha=0.3,training.steps=500 --workdir=runs/x
python launch/train.py --config=configs/quickstart.py:debug --workdir=runs/x   # under a minute
```

The argument after the colon is a list of `debug`, dotted fields and short names ({short}).
An unknown field, or a value out of its range, is an error before anything is read.
"""


def page() -> str:
    """The whole text of configuration.md."""
    text = HEAD.format(short=", ".join(f"`{name}`" for name in SHORT_NAMES))
    section = None
    for name, field in config_fields().items():
        group = name.rpartition(".")[0]
        if group != section:
            section = group
            heading = f"`{group}`" if group else "The run"
            text += f"\n## {heading}\n\n| field | default | values | |\n| --- | --- | --- | --- |\n"
        shown = "not set" if field.default is None else f"`{field.default!r}`"
        if "|" in shown:  # which would end the cell
            shown = f"<code>{shown.strip('`').replace('|', '&#124;')}</code>"
        sentence = field.description.replace("|", "\\|")
        text += f"| `{name}` | {shown} | {range_words(field.annotation)} | {sentence} |\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
