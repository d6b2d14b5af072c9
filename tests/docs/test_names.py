"""Every file, function and link that README and docs name exists."""

import re
from pathlib import Path

import pages
import pytest

# Files that a run writes, or a user brings: not in the repository.
_FOREIGN_FILES = re.compile(
    r"(WORKDIR|runs|exported|models|cf/logits)/|W/|"
    r"^(checkpoints/|log\.jsonl|config\.json|manifest\.json|ids\.npz|item\.csv|(train|valid|test)\*\.csv|"
    r"results\.\w+|details\.md|training\.png|examples\.md|histories\.jsonl|\.?[\w-]*\.(npz|npy|pth|safetensors|csv|parquet|inter|item|jsonl|png|json|dat|data|tsv)(\.gz)?)$"
)
# Names of other libraries, of data and of run-time files.
_FOREIGN_NAMES = {
    "rec_sequences", "model_type", "gemma3_text", "scatter_add", "hist_id", "item_table",
    "item_bias", "shard_map", "from_pretrained", "log_softmax", "AutoModelForCausalLM", "PeftModel",
}  # fmt: skip


def _sources() -> str:
    """Every line of code, to look names up in."""
    folders = ("tca4rec_jax", "configs", "launch", "tests", "docs")
    files = [f for folder in folders for f in (pages.ROOT / folder).rglob("*.*")]
    kept = [f for f in files if f.suffix in (".py", ".sh", ".sbatch", ".yaml", ".yml")]
    return "\n".join(f.read_text() for f in kept if f.parent != Path(__file__).parent)


SOURCES = _sources()
WORDS = set(re.findall(r"\w+", SOURCES))
FILES = [
    str(path.relative_to(pages.ROOT))
    for folder in ("tca4rec_jax", "configs", "launch", "tests", "docs", ".")
    for path in (pages.ROOT / folder).glob("*" if folder == "." else "**/*")
]
FILE_NAMES = {Path(path).name for path in FILES}


def _exists(name: str) -> bool:
    """Whether the repository has a path (from its root or from the package), perhaps with a *."""
    name = name.rstrip("/")
    return any(any(root.glob(name)) for root in (pages.ROOT, pages.ROOT / "tca4rec_jax"))


def problems(text: str) -> list[str]:
    """Paths and Python names in `backticks` that the repository does not have."""
    found = []
    for quote in pages.quoted(text):
        if _FOREIGN_FILES.search(quote) or quote.startswith("-"):
            continue
        for path in re.findall(r"(?<![\w:/.=~-])(?:\.?\w+/)*\.?\w+(?:\.\w+)?/?(?![\w/])", quote):
            is_path = "/" in path and path.split("/")[0].lstrip(".") and " / " not in quote
            is_file = path.endswith((".py", ".sh", ".md", ".sbatch"))
            if is_path and path[0].islower() and not _exists(path) and "." in path + quote:
                found.append(f"no path {path}")
            elif is_file and not is_path and path not in FILE_NAMES:
                found.append(f"no file {path}")
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", quote) and not quote.endswith((".py", ".md")):
            for part in quote.rstrip("()").split("."):
                compound = "_" in part.strip("_") or re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", part)
                if compound and part not in WORDS | _FOREIGN_NAMES:
                    found.append(f"no name {part} (of {quote}) in the sources")
    return found


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    found = []
    for link in pages.links(text):
        if re.match(r"\w+://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            found.append(f"no file {link}")
        elif anchor and anchor not in pages.anchors(target.read_text()):
            found.append(f"no heading {link}")
    return found


def gone_files(source: str) -> list[str]:
    """Files that docstrings and comments of the code cite and the repository does not have."""
    cited = re.findall(r"(?<![\w$*{}/.<>-])((?:\w+/)*\w+\.(?:py|md|sh|sbatch))\b", source)
    by_a_run = {f"{name}.md" for name in ("results", "details", "comparison", "examples", "report")}
    written = by_a_run | {"file.py"}  # a name for any file
    found = [name for name in cited if name not in written and not name.startswith("WORKDIR/")]
    return [name for name in found if not any(f"/{path}".endswith(f"/{name}") for path in FILES)]


@pytest.mark.parametrize("folder", ["tca4rec_jax", "configs", "launch"])
def test_the_code_cites_files_that_exist(folder):
    files = [f for f in (pages.ROOT / folder).rglob("*") if f.suffix in (".py", ".sh", ".sbatch")]
    gone = {str(file): gone_files(file.read_text()) for file in files}
    assert not {file: names for file, names in gone.items() if names}


def test_a_cited_file_that_is_gone_is_found():
    assert gone_files("# see no_such_module.py")
    assert gone_files("cf/trie.py")
    assert not gone_files("core/trie.py and docs/method.md, trie.py")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_path_and_name_exists(page):
    assert not problems(page.read_text())


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert not dead_links(page, page.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "`tca4rec_jax/core/no_such_module.py`",
        "`no_such_module.py`",
        "`tests/no_such_folder/test_x.py`",
        "`no_such_function`",
        "`ItemTrie.no_such_method`",
        "`NoSuchClass`",
    ],
)
def test_a_name_that_is_gone_is_found(text):
    assert problems(text)


@pytest.mark.parametrize("link", ["no_such_page.md", "docs/method.md#no-such-heading", "#nowhere"])
def test_a_dead_link_is_found(link):
    assert dead_links(pages.README, f"[x]({link})")


def test_links_to_what_exists_are_fine():
    assert not dead_links(
        pages.README, "[x](docs/method.md#the-collaborative-tokenizer) `[y](z.md)`"
    )


def test_the_readme_is_short_and_leads_to_every_page():
    text = pages.README.read_text()
    assert len(text.splitlines()) <= 230
    for page in pages.PAGES[1:]:
        linked = f"(docs/{page.name})" in text or page.name == "index.md"
        assert linked, f"README does not link docs/{page.name}"


def test_the_site_has_every_page():
    site = (pages.ROOT / "docs/mkdocs/mkdocs.yml").read_text()
    for page in pages.PAGES[1:]:
        assert f"- {page.name}\n" in site, f"docs/mkdocs/mkdocs.yml does not list {page.name}"
