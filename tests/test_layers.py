"""Which folder may import which: inference never leads to the training loop, core to nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "tca4rec_jax").rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The package's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(MODULES[module].read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def reached(folder: str) -> set[str]:
    """All modules that importing a folder of the package leads to."""
    found, left = set(), {name for name in MODULES if name.startswith(f"tca4rec_jax.{folder}")}
    assert left
    while left:
        module = left.pop()
        found.add(module)
        left |= imported(module) - found
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("decoding", ("train", "training.loop", "training.step", "training.batches", "evaluation")),
        ("recommenders", ("train", "training.loop", "training.step", "evaluation")),
        ("experiment", ("train", "training.loop", "training.step", "evaluation")),
        ("core", ("cf", "llm", "decoding", "training", "evaluation", "experiment", "train")),
        ("llm", ("decoding", "training", "evaluation", "experiment", "train")),
        ("cf", ("llm", "decoding", "training", "evaluation", "experiment", "train")),
        ("", ("launch",)),
    ],
)
def test_a_folder_never_leads_to_those_above_it(folder, forbidden):
    prefixes = [f"tca4rec_jax.{name}" for name in forbidden]
    above = {m for m in reached(folder) for p in prefixes if m == p or m.startswith(f"{p}.")}
    assert not above


@pytest.mark.parametrize("folder", ["decoding"])
def test_inference_imports_nothing_of_training_itself(folder):
    own = {name for name in MODULES if name.startswith(f"tca4rec_jax.{folder}.")}
    assert not {m for name in own for m in imported(name) if ".train" in m}
