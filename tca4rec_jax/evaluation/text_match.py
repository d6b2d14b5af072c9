"""Hits by text, as the published evaluation counts them (evaluation.text_match; docs/official.md).

A list is what its tokens decode to, and a hit is a text equal to the target's title. A title that
its tokenizer cleans up, or that begins or ends with the padding token's letter, is never one.

Axes: core/__init__.py; here R are rows, M the places of a list.
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

from tca4rec_jax.core.trie import ItemTrie
from tca4rec_jax.experiment import Experiment


def text_rank(experiment: Experiment, leaves_RxM: np.ndarray, target_R: np.ndarray) -> np.ndarray:
    """The 0-based place of each target item's title among the texts of titles, int32 [R], or -1.

    The lists hold leaves of the trie, -1 where one is shorter.
    """
    text_Q = texts(experiment.trie, experiment.tokenizer)
    titles = experiment.data.catalogue.titles
    number = {text: at for at, text in enumerate(dict.fromkeys([*titles, *text_Q]))}
    number_Q = np.array([number[text] for text in text_Q])
    wanted_R = np.array([number[titles[item]] for item in target_R], int)
    hit_RxM = (number_Q[leaves_RxM] == wanted_R[:, None]) & (leaves_RxM >= 0)
    return np.where(hit_RxM.any(axis=1), hit_RxM.argmax(axis=1), -1).astype(np.int32)


def texts(trie: ItemTrie, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokens of each leaf decode to, without their end.

    Where a tokenizer has no padding token the published code takes its first one, and strips
    padding of a single letter from both ends.
    """
    padding = tokenizer.pad_token or str(tokenizer.convert_ids_to_tokens(0))
    stripped = padding if len(padding) == 1 else ""
    rows = zip(trie.tokens_QxL.tolist(), trie.lengths_Q.tolist(), strict=True)
    decoded = (
        tokenizer.decode(row[: length - 1], skip_special_tokens=True) for row, length in rows
    )
    return [str(text).strip(stripped) if stripped else str(text) for text in decoded]
