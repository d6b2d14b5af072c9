"""README.md and docs/*.md as the tests read them: code blocks, quoted code, links, headings."""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Programs that a shell block may call: each is a function that writes down its arguments.
_RECORDED = ("python", "bash", "hf", "pip", "tca4rec", "sbatch", "curl", "git", "docker", "st")
_RECORDED += ("jupyter", ".venv/bin/python", ".venv/bin/mkdocs")


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for found, body in _BLOCK.findall(text) if found == language]


def quoted(text: str) -> list[str]:
    """What stands in `backticks` outside fenced blocks, on one line."""
    return re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures, outside code."""
    prose = re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def commands(block: str) -> list[list[str]]:
    """The commands of a shell block, as bash expands them; nothing is run.

    Raises:
      AssertionError: bash cannot read the block.
    """
    record = '() { printf \'%s\\n\' "$FUNCNAME" "$@" --END--; }\n'
    functions = "".join(name + record for name in _RECORDED)
    done = subprocess.run(
        [shutil.which("bash"), "-euc", f"source() {{ :; }}\n{functions}{block}"],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent, env={"PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{block}"
    listed = [words.split("\n") for words in done.stdout.split("--END--\n")]
    return [words[:-1] for words in listed if words != [""]]
