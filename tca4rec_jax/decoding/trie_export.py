"""The catalogue beside an exported LLM: its trie and prompts as trie.npz, and the file of code that
transformers, vLLM and SGLang take it by.

Axes: core/__init__.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tca4rec_jax.config import score_weights
from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.data.ragged import Ragged
from tca4rec_jax.data.templates import carried_vectors
from tca4rec_jax.decoding import trie_logits_processor
from tca4rec_jax.experiment import Experiment

CODE = "trie_logits_processor.py"


def lists_elsewhere(experiment: Experiment) -> bool:
    """Whether the recommender's lists are a search of the trie."""
    config = experiment.config
    return experiment.recipe.evaluated_by == "rankings" and config.decoding.find == "beams"


def write_trie(experiment: Experiment, folder: Path) -> None:
    """Writes trie.npz, with the items that decoding allows, and the code beside it.

    `start` is null, so that no engine can tell where a title begins in a prompt, if prompts have
    no text before it or a title has the same. Texts of prompts are left out if prompts are not
    made of them: with vectors, candidates or tokens of the whole.
    """
    items, catalogue, config = experiment.items, experiment.data.catalogue, experiment.config
    kept = np.flatnonzero(experiment.item_filter.allowed_I)
    trie = ItemTrie.build(items.written.take(kept))
    weights, start = score_weights(config, 0.0), items.after[0]
    ends = np.unique(items.written.values[items.written.offsets[1:] - 1])
    arrays: dict[str, Any] = {"tokens": trie.tokens_QxL, "lengths": trie.lengths_Q}
    arrays["leaf_of_item"] = np.full(catalogue.num_items, trie.num_leaves, np.int32)
    arrays["leaf_of_item"][kept] = trie.leaf_of_item  # Q: not allowed
    if not carried_vectors(config.prompt) and items.between is None and items.whole is None:
        separator = Ragged.from_lengths(items.separator, np.array([items.separator.size]))
        first = items.before.take(np.array([0])), items.after.take(np.array([0]))
        pieces = {"before": first[0], "shown": items.shown, "separator": separator}
        for name, rows in (pieces | {"after": first[1]}).items():
            arrays |= {name: rows.values, f"{name}_lengths": rows.lengths}
    decoding = config.decoding
    about = {
        "item_ids": list(catalogue.item_ids),
        "titles": list(catalogue.titles),
        "mask": decoding.mask,
        "rules": decoding.rules,
        "beams": decoding.beams,
        "temperature": weights.temperature,
        "length_penalty": weights.length_penalty,
        "exclude_history": experiment.item_filter.exclude_history,
        "end": int(ends[0]) if len(ends) == 1 else None,
        "start": start.tolist() if _is_certain(start, items.written) else None,
        "max_tokens": config.prompt.max_tokens,
        "history_length": config.data.history_length,
    }
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(folder / trie_logits_processor.FILE, **arrays)
    shutil.copyfile(trie_logits_processor.__file__, folder / CODE)


def _is_certain(start: np.ndarray, titles: Ragged) -> bool:
    """Whether the last place of these tokens in any title after them is where it begins."""
    if not len(start):
        return False
    starts = Ragged(np.tile(start, len(titles)), len(start) * np.arange(len(titles) + 1))
    rows = starts.followed_by(titles)
    windows = np.lib.stride_tricks.sliding_window_view(rows.values, len(start))
    matches = np.flatnonzero((windows == start).all(axis=1))
    within = rows.row_of(matches) == rows.row_of(matches + len(start) - 1)
    return np.count_nonzero(within) == len(titles)
