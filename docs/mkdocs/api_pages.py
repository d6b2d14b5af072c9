"""A hook of MkDocs: the API reference, one page for every folder of the package.

The pages are made while the site is built and lie in no folder, so a new module or folder is in the
reference without another line. mkdocstrings fills them from the docstrings.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = "tca4rec_jax"


def pages() -> dict[str, list[str]]:
    """{page: its modules}, the package's own modules first."""
    modules = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        folder = ".".join(parts[:-1])
        if parts[-1] == "__init__":
            modules.setdefault(folder, []).insert(0, folder)
        else:
            modules.setdefault(folder, []).append(".".join(parts))
    return dict(sorted(modules.items()))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in pages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, modules in pages().items():
        text = f"# {name}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files
