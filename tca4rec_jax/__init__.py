"""Token-level Collaborative Alignment for LLM-based generative recommendation, in JAX/Flax.

The names below are the public ones; each is imported when it is first asked for.
"""

import importlib
import os

# "PyTorch was not found", says transformers otherwise at every start; it is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOME = {
    "ItemTrie": "core.trie",
    "DeviceTrie": "core.trie",
    "title_decisions": "core.decisions",
    "Targets": "core.decisions",
    "CFItems": "core.collaborative_tokenizer",
    "project": "core.collaborative_tokenizer",
    "token_distributions": "inspection",
    "Objective": "core.objective",
    "tca_loss": "core.losses",
    "of_logits": "core.losses",
    "Recommender": "decoding.recommender",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
